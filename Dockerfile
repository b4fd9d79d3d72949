# A server without torch, for a model directory that is mounted at /model:
#   docker build -t sparsebert .
#   docker run --read-only --tmpfs /cache -v $PWD/fast:/model:ro -p 8080:8080 -e SPARSEBERT_API_KEY=… sparsebert
FROM python:3.12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN pip install --no-cache-dir build && python -m build --wheel --outdir /wheels /src
RUN python -m venv /opt/sparsebert \
    && /opt/sparsebert/bin/pip install --no-cache-dir -c /src/constraints.txt "$(ls /wheels/*.whl)[serve]" \
    && /opt/sparsebert/bin/pip uninstall -y pip

FROM python:3.12-slim
COPY --from=build /opt/sparsebert /opt/sparsebert
ENV PATH=/opt/sparsebert/bin:$PATH PYTHONDONTWRITEBYTECODE=1
# Only the address is another one than by default, so that a key is asked for: SPARSEBERT_API_KEY, or --api-key-file.
ENV SPARSEBERT_SERVE_HOST=0.0.0.0 SPARSEBERT_CACHE=/cache
RUN install -d -o 10001 -g 10001 /cache
USER 10001:10001
VOLUME /cache
EXPOSE 8080
HEALTHCHECK --start-period=10s CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ.get('SPARSEBERT_SERVE_PORT', '8080') + '/health/ready', timeout=2)"]
ENTRYPOINT ["sparsebert", "serve"]
CMD ["/model"]
