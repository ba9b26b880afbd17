"""The dashboard's templates and static files. Written by hand; there is no build step and no library in them."""
