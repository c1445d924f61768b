# The command line for CPUs, without compilers in the image:
#
#   docker build -t musicgen-fast .
#   docker run --rm -v "$PWD/out:/out" musicgen-fast generate "slow bells" -m demo -o /out
#   docker run --rm -v "$PWD/out:/out" -v "$HOME/.cache/huggingface:/cache" musicgen-fast generate "lofi piano" -o /out
#
# With a GPU (NVIDIA's container toolkit on the host): torch's wheels bring CUDA along, Triton needs a C compiler:
#
#   docker build -t musicgen-fast:gpu --build-arg TORCH_ARGS= --build-arg EXTRA="gcc libc6-dev" .
#   docker run --rm --gpus all -v "$PWD/out:/out" musicgen-fast:gpu doctor
FROM python:3.12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY csrc csrc
COPY kernels kernels
COPY musicgen_fast musicgen_fast
RUN MUSICGEN_FAST_NO_CUDA=1 pip wheel --no-cache-dir --no-deps -w /wheels .

FROM python:3.12-slim
ARG TORCH_ARGS="--index-url https://download.pytorch.org/whl/cpu"
ARG EXTRA=""
RUN if [ -n "$EXTRA" ]; then apt-get update && apt-get install -y --no-install-recommends $EXTRA \
    && rm -rf /var/lib/apt/lists/*; fi
RUN pip install --no-cache-dir "torch>=2.11" $TORCH_ARGS
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir /wheels/*.whl && rm -rf /wheels
RUN useradd --create-home user && mkdir -p /out /cache && chown user /out /cache
USER user
ENV HF_HOME=/cache
WORKDIR /home/user
ENTRYPOINT ["musicgen-fast"]
CMD ["--help"]
