# A CUDA image of the server. Not built in this repository's tests: there is no docker engine where they run.
#   docker build -t retrieval-server .
#   docker run --gpus all -p 8000:8000 retrieval-server --model /models/llama --max-model-len 131072

FROM nvidia/cuda:12.8.1-devel-ubuntu24.04 AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-dev python3-venv g++ \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /source
RUN python3 -m venv /opt/venv
# Dependencies first: they change less often than the sources.
COPY constraints.txt ./
RUN /opt/venv/bin/pip install --no-cache-dir -c constraints.txt torch transformers faiss-cpu fastapi uvicorn
COPY pyproject.toml README.md CMakeLists.txt ./
COPY retrieval retrieval
COPY server server
RUN /opt/venv/bin/pip install --no-cache-dir -c constraints.txt .

FROM nvidia/cuda:12.8.1-runtime-ubuntu24.04
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 curl libgomp1 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 retrieval
COPY --from=build /opt/venv /opt/venv
USER retrieval
ENV PATH=/opt/venv/bin:$PATH HF_HOME=/home/retrieval/models
EXPOSE 8000
# A large model takes minutes to load; the port is closed until it has.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
  CMD curl --fail --silent http://127.0.0.1:8000/health
STOPSIGNAL SIGTERM
ENTRYPOINT ["retrieval-server", "serve", "--host", "0.0.0.0", "--port", "8000"]
