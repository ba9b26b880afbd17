# Breakwater as an image: its own user, nothing writable but the store, nothing in it for one architecture alone.
#
#   docker build -t breakwater .
#   docker run --read-only --tmpfs /tmp -p 127.0.0.1:5000:5000 -v breakwater:/var/lib/breakwater breakwater
#
# BASE is any image with Python 3.11 or newer and its venv module, for example a debootstrapped Debian in a place that
# reaches no registry. Keep its digest beside the version where you build for others: BASE=…@sha256:…
ARG BASE=docker.io/library/python:3.13.5-slim-bookworm

FROM ${BASE} AS build
# For builders without the network: wheels from a folder (--volume), or another index.
ARG PIP_NO_INDEX
ARG PIP_FIND_LINKS
ARG PIP_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python3 -m venv /opt/breakwater
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY proxy ./proxy
# Compiled here, because nothing can be written there; without pip, because nothing is to be installed there.
RUN /opt/breakwater/bin/pip install --quiet --only-binary=:all: . \
 && /opt/breakwater/bin/pip uninstall --quiet --yes setuptools pip \
 && /opt/breakwater/bin/python -m compileall -q /opt/breakwater \
 && mkdir /store

FROM ${BASE}
LABEL org.opencontainers.image.title="Breakwater" \
      org.opencontainers.image.description="A caching pull-through proxy for OCI registries" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/breakwater /opt/breakwater
COPY config/container.toml /etc/breakwater/breakwater.toml
COPY --from=build --chown=65532:65532 /store /var/lib/breakwater
ENV PATH=/opt/breakwater/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 65532:65532
WORKDIR /var/lib/breakwater
VOLUME /var/lib/breakwater
EXPOSE 5000 5001
# Alive is what answers; whether upstreams and the disk are well is /readyz's, and no reason to restart.
HEALTHCHECK --interval=30s --timeout=10s --start-period=5s CMD ["breakwater", "status", "--json"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["breakwater"]
CMD ["serve"]
