# The worker's image: vLLM's own image with RunPod's SDK and these modules on top.
#
#   docker build -t sealed-vllm:0.1.0 .
#
# On a machine without a GPU, the CPU engine on plain Debian:
#
#   docker build -t sealed-vllm:0.1.0-cpu --build-arg BASE=debian:12-slim --build-arg ENGINE=cpu .

ARG BASE=vllm/vllm-openai:v0.32.0
FROM ${BASE}

# base: vLLM comes with the base image; cpu: install it from requirements/engine-cpu.txt.
ARG ENGINE=base

# On Debian: g++ and Python's headers are what torch.compile needs, libnuma1 what vLLM is linked to.
RUN if [ "$ENGINE" = cpu ]; then \
        apt-get update && \
        DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
            python3 python3-dev python3-venv g++ libnuma1 ca-certificates && \
        apt-get clean && rm -rf /var/lib/apt/lists/*; \
    fi

WORKDIR /worker
COPY requirements/worker.txt requirements/engine-cpu.txt requirements/overrides.txt \
    requirements/constraints.txt requirements/
COPY tools/setup.sh tools/setup.sh

# What only the build may know, a package index with a password say, comes as a shell script and
# leaves no trace in the image: --secret id=build_env,src=FILE, with lines like
#   export PIP_INDEX_URL=... PIP_FIND_LINKS=... SSL_CERT_FILE=... HF_ENDPOINT=...
#
# In vLLM's image uv keeps every version that fits, so torch and vLLM stay as they were built.
ENV PATH=/opt/venv/bin:$PATH
RUN --mount=type=secret,id=build_env --mount=type=cache,target=/root/.cache \
    set -eu; \
    if [ -f /run/secrets/build_env ]; then . /run/secrets/build_env; fi; \
    if [ "${PIP_INDEX_URL:-}" ]; then export UV_DEFAULT_INDEX="$PIP_INDEX_URL"; fi; \
    export UV_CACHE_DIR="${UV_CACHE_DIR:-/root/.cache/uv}" UV_LINK_MODE=copy; \
    case "$ENGINE" in \
    base) \
        uv pip install --system --break-system-packages --compile-bytecode \
            --override requirements/overrides.txt -r requirements/worker.txt ;; \
    cpu) \
        tools/setup.sh /opt/venv requirements/worker.txt requirements/engine-cpu.txt ;; \
    *) \
        echo "ENGINE is base or cpu, not $ENGINE" >&2; exit 1 ;; \
    esac; \
    python3 -c "import cryptography, huggingface_hub, importlib.util, msgspec, psutil, runpod; \
assert importlib.util.find_spec('vllm'), 'the base image has no vLLM: use ENGINE=cpu'"

COPY *.py vllm_logging.json LICENSE ./
# A container that may not write here, or a new one at every start, would compile them each time.
RUN python3 -m compileall -q .

# A model inside the image starts with no network and no volume:
#   docker build --build-arg MODEL=org/name [--build-arg MODEL_REVISION=commit] \
#       [--secret id=hf_token,src=FILE for a gated one] .
ARG MODEL=
ARG MODEL_REVISION=
COPY tools/bake_model.sh tools/bake_model.sh
RUN --mount=type=secret,id=hf_token --mount=type=secret,id=build_env \
    if [ -n "$MODEL" ]; then \
        if [ -f /run/secrets/build_env ]; then . /run/secrets/build_env; fi; \
        HF_TOKEN="$(cat /run/secrets/hf_token 2>/dev/null || true)" \
            tools/bake_model.sh "$MODEL${MODEL_REVISION:+@$MODEL_REVISION}" /worker/models; \
    fi
ENV MODEL_DIRS=/worker/models MODELS=${MODEL}

# RunPod mounts the network volume as root's and offers no way to change that, and a worker that
# cannot write there downloads its model at every cold start. So root is the default. Where the
# volume belongs to somebody else, or there is none: --build-arg RUN_AS=worker.
RUN useradd --system --create-home --shell /usr/sbin/nologin worker
ARG RUN_AS=root
USER ${RUN_AS}

# The root file system may be read-only. What is written: HF_HOME (the volume), ~/.cache, /dev/shm,
# and /tmp where /dev/shm is small. What is compiled there is run, hence `exec`:
#   docker run --gpus all --read-only --tmpfs /tmp:exec --tmpfs /root/.cache:exec \
#       -v VOLUME:/runpod-volume -e MODELS -e ENCRYPTION_KEY IMAGE
# vLLM's image starts its server by an entry point.
ENTRYPOINT []
CMD ["python3", "-u", "rp_handler.py"]
