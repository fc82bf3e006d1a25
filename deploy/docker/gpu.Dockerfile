# sbtk on an NVIDIA GPU. Build it from the repository's root; docs/deploy.md says how, and how to
# run it. CUDA and cuDNN come with onnxruntime-gpu as wheels, so the base knows nothing of CUDA; the
# driver comes from the host.
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
# TensorRT is asked for, --build-arg EXTRAS=gpu,tensorrt: its libraries are not on PyPI, and while
# pip installs them it fetches them from the vendor's own index.
ARG EXTRAS=gpu
RUN /opt/sbtk/bin/python -m pip install --find-links /wheels --only-binary hnswlib \
        --constraint constraints.txt ".[hnsw,${EXTRAS}]"

FROM ${PYTHON}
COPY --from=build /opt/sbtk /opt/sbtk
RUN groupadd --gid 10001 sbtk \
    && useradd --uid 10001 --gid sbtk --no-create-home --home-dir /nonexistent \
        --shell /usr/sbin/nologin sbtk \
    && install --directory --owner=sbtk --group=sbtk --mode=0755 /gallery \
    && install --directory --owner=sbtk --group=sbtk --mode=0700 /cache
ENV PATH=/opt/sbtk/bin:${PATH} SBTK_GALLERY=/gallery
# For programs that use sbtk as a library; the command does this by itself.
ENV OPENBLAS_THREAD_TIMEOUT=4 ORT_DISABLE_TELEMETRY=1
# TensorRT plans and timing caches: outside the image, for they belong to one GPU.
ENV XDG_CACHE_HOME=/cache
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME ["/gallery", "/cache"]
USER 10001:10001
# No image is made in which no engine works; without a GPU at build time that is the CPU's.
RUN ["sbtk", "doctor"]
ENTRYPOINT ["sbtk"]
CMD ["--help"]
