# torchrun on NVIDIA GPUs, as no root. docs/environments.md has the commands:
#   docker build --tag nanospeedrun .
#   docker run --rm --gpus all --ipc host nanospeedrun --standalone --nproc_per_node=8 train_gpt.py --preset speedrun
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04

# Triton compiles its launchers with gcc against Python's headers. Ubuntu keeps one version of a package: none is named.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3 python3-dev \
    && rm -rf /var/lib/apt/lists/*

COPY --from=ghcr.io/astral-sh/uv:0.13.9 /uv /usr/local/bin/uv

ENV UV_PROJECT_ENVIRONMENT=/opt/venv \
    UV_PYTHON_DOWNLOADS=never \
    UV_NO_CACHE=1 \
    PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1

WORKDIR /speedrun
COPY pyproject.toml uv.lock ./
RUN uv sync --frozen --extra cu13

RUN useradd --create-home --uid 10001 speedrun && chown speedrun /speedrun
COPY --chown=speedrun . .
USER 10001

# torch names its caches after the user, whom --user "$(id -u)" leaves without a name.
ENV USER=speedrun

# Bytes of Python's own sources, so that the image trains without further data.
RUN python data/stdlib.py && mkdir -p logs

ENTRYPOINT ["torchrun"]
CMD ["--standalone", "--nproc_per_node=gpu", "train_gpt.py"]
