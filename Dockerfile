# For a machine without an NVIDIA GPU; docs/building.md says how to use it.
ARG PYTHON=3.13

FROM python:${PYTHON} AS build
WORKDIR /src
COPY . .
RUN pip wheel . --no-deps --wheel-dir /wheels -C cmake.args=--preset=portable

FROM python:${PYTHON}-slim
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(echo /wheels/*.whl)[guidance,hub]"
# Models, and what is downloaded, are kept in the volume.
ENV HOME=/models OVERSPILL_MODELS=/models
RUN install -d -o 1000 -g 1000 /models
VOLUME /models
WORKDIR /models
USER 1000:1000
ENTRYPOINT ["overspill"]
CMD ["--help"]
