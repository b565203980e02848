FROM python:3.11-slim AS build
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY engine engine
COPY planner planner
COPY service service
COPY migrations migrations
COPY src src
RUN python -m venv /opt/chunkplan \
 && /opt/chunkplan/bin/pip install --no-cache-dir --quiet --constraint constraints.txt .

FROM python:3.11-slim
RUN useradd --create-home --uid 10001 chunkplan
COPY --from=build /opt/chunkplan /opt/chunkplan
ENV PATH=/opt/chunkplan/bin:$PATH
USER 10001
WORKDIR /home/chunkplan
RUN mkdir var
VOLUME /home/chunkplan/var
EXPOSE 8321
HEALTHCHECK --interval=30s --timeout=5s --start-period=20s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8321/readyz', timeout=4)"]
# Refused until there is an API key (`chunkplan keys create`), or CHUNKPLAN_TRUSTED_NETWORK=true says that the port is
# published on a closed network only.
CMD ["chunkplan", "serve", "--host", "0.0.0.0"]
