# One image that trains, samples, serves and evaluates:
#
#   docker build -t papilio --build-arg COMMIT=$(git rev-parse HEAD) .
#   docker run -p 8000:8000 papilio                                         serves the default model
#   docker run -v "$PWD/photos:/photos" -v "$PWD/runs:/app/runs" papilio train.py --data /photos
#
# For CUDA: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128
ARG BASE=python:3.12-slim

FROM ${BASE} AS packages
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY requirements.txt constraints.txt ./
# Builds of PyTorch's own index are preferred: to pip, 2.14.1+cpu is newer than 2.14.1.
RUN python -m venv /venv \
 && /venv/bin/pip install --no-cache-dir --extra-index-url "${TORCH_INDEX}" -c constraints.txt -r requirements.txt

FROM ${BASE}
RUN useradd --create-home --uid 1000 papilio && install -d -o papilio /app /app/runs /served /watch
COPY --from=packages /venv /venv
WORKDIR /app
COPY *.py LICENSE ./
COPY builtin builtin
COPY web web
ARG COMMIT=unknown
LABEL org.opencontainers.image.title=Papilio org.opencontainers.image.licenses=MIT \
      org.opencontainers.image.revision=${COMMIT}
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PAPILIO_COMMIT=${COMMIT}
USER papilio
EXPOSE 8000
# For other commands than the server, and with --port: docker run --no-healthcheck
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import http.client, os; c = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('PORT', 8000)), timeout=4); c.request('GET', '/healthz'); assert c.getresponse().status == 200"]
ENTRYPOINT ["python"]
CMD ["server.py", "--host", "0.0.0.0"]
