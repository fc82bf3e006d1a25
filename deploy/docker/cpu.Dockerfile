# sbtk on a CPU. Build it from the repository's root; docs/deploy.md says how, and how to run it.
ARG PYTHON=python:3.11.14-slim-bookworm

FROM ${PYTHON} AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY constraints.txt ./
# hnswlib comes as source and is built for the builder's processor unless told otherwise.
RUN HNSWLIB_NO_NATIVE=1 python -m pip wheel --no-deps --wheel-dir /wheels \
        --constraint constraints.txt hnswlib
RUN python -m venv /opt/sbtk
COPY pyproject.toml README.md LICENSE ./
COPY sbtk_runtime sbtk_runtime
COPY sbtk_train sbtk_train
COPY sbtk_export sbtk_export
COPY cli cli
# More of them by --build-arg, such as EXTRAS=cpu,openvino.
ARG EXTRAS=cpu
RUN /opt/sbtk/bin/python -m pip install --find-links /wheels --only-binary hnswlib \
        --constraint constraints.txt ".[hnsw,${EXTRAS}]"

FROM ${PYTHON}
COPY --from=build /opt/sbtk /opt/sbtk
RUN groupadd --gid 10001 sbtk \
    && useradd --uid 10001 --gid sbtk --no-create-home --home-dir /nonexistent \
        --shell /usr/sbin/nologin sbtk \
    && install --directory --owner=sbtk --group=sbtk --mode=0755 /gallery
ENV PATH=/opt/sbtk/bin:${PATH} SBTK_GALLERY=/gallery
# For programs that use sbtk as a library; the command does this by itself.
ENV OPENBLAS_THREAD_TIMEOUT=4 ORT_DISABLE_TELEMETRY=1
VOLUME ["/gallery"]
USER 10001:10001
# No image is made in which no engine works.
RUN ["sbtk", "doctor"]
ENTRYPOINT ["sbtk"]
CMD ["--help"]
