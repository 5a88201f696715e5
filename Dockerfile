# API, worker, upkeep and Prefect server: one image, of which each is a command.
#
# Nothing is fetched while it is built: `scripts/wheels` has put what uv.lock names into dist/wheels, for the Python of
# the machine that it ran on. BASE has to have the same one.
#
#   scripts/wheels
#   docker build --tag compute-to-data .
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
COPY dist/wheels /wheels
# By the pip that lies among the wheels: a base need not have one, and the image is to have none.
RUN python3 -m venv --without-pip /opt/c2d \
    && python3 "$(echo /wheels/pip-*.whl)/pip" --python /opt/c2d/bin/python install --no-cache-dir --no-index --no-deps \
        --find-links /wheels --requirement /wheels/locked.txt compute-to-data \
    && /opt/c2d/bin/c2d --help

FROM ${BASE}
# What of the system is to be in the image, such as "bubblewrap libseccomp2 util-linux" for environments whose runner is
# `process`. This alone needs a network.
ARG PACKAGES=""
RUN [ -z "$PACKAGES" ] || { apt-get update && apt-get install --yes --no-install-recommends $PACKAGES \
        && rm -rf /var/lib/apt/lists/*; }
COPY --from=build /opt/c2d /opt/c2d
COPY prefect.yaml /srv/c2d/
COPY deploy /srv/c2d/deploy
# A user that is the same on every machine, since it owns what is kept.
RUN echo 'c2d:x:10001:10001::/var/lib/c2d:/bin/sh' >> /etc/passwd && mkdir -p /var/lib/c2d \
    && python3 -c 'import os; os.chown("/var/lib/c2d", 10001, 10001); os.chmod("/var/lib/c2d", 0o700)'
# Prefect writes below its home, and its server writes the pages of its UI: with these, no other place than /tmp and
# the state is written to.
ENV PATH=/opt/c2d/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    C2D_STATE=/var/lib/c2d \
    C2D_HEALTH_URL=http://127.0.0.1:8050/health \
    PREFECT_HOME=/tmp/prefect \
    PREFECT_UI_STATIC_DIRECTORY=/tmp/prefect-ui \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    PREFECT_SERVER_ALLOW_EPHEMERAL_MODE=false \
    DO_NOT_TRACK=1
WORKDIR /srv/c2d
USER 10001:10001
# Of whatever runs here: C2D_HEALTH_URL says where it tells.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(os.environ['C2D_HEALTH_URL'], timeout=4)"]
CMD ["python", "-m", "api.main"]
