# docker build -t fewstep .                          CPU: ONNX Runtime and OpenVINO
# docker build -t fewstep:gpu --build-arg TARGET=gpu .   CUDA: ONNX Runtime's CUDA and TensorRT providers
# docker run -p 8000:8000 fewstep                    serves the shipped 4-step student
ARG TARGET=cpu

FROM python:3.11-slim AS base
ENV PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 HF_HUB_OFFLINE=1
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY models models
COPY runtime runtime
COPY export export
COPY server server
COPY trainers trainers

FROM base AS cpu
RUN pip install -c constraints.txt torch==2.13.0 && pip install -c constraints.txt ".[serve,export,openvino]"

FROM base AS gpu
# onnxruntime-gpu and tensorrt instead of the CPU onnxruntime; never both, they ship the same module
RUN pip install torch && pip install ".[serve,gpu]"

FROM ${TARGET} AS final
RUN rm -rf /src && useradd --create-home fewstep
USER fewstep
WORKDIR /home/fewstep
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s CMD \
    python -c "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/ready', timeout=2)"
ENTRYPOINT ["fewstep"]
CMD ["serve", "scenes-lcm", "--host", "0.0.0.0"]
