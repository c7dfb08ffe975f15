# The engine in a container. For the CPU:
#   docker build -t robust-engine .
# For CUDA, with PyTorch's default wheels (CUDA 13) and the Triton kernels:
#   docker build -t robust-engine --build-arg TORCH_INDEX= --build-arg EXTRAS=gpu .
FROM python:3.12-slim-bookworm

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=

# The C++ kernels are built with g++; Triton also calls gcc when it runs.
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ cmake \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/robust-engine
COPY . .
RUN pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url $TORCH_INDEX} \
      -c constraints.txt ".${EXTRAS:+[$EXTRAS]}"

# Runs and data sets lie in a volume: docker run -v "$PWD:/workspace" ...
WORKDIR /workspace
ENV ENGINE_DATA=/workspace/data
ENTRYPOINT ["engine"]
CMD ["--help"]
