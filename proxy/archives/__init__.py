"""Archives: tar as a stream, packed and in parts, as others write them, signed. No adapter of anything at rest."""
