ARG PYTHON_IMAGE=python:3.12-slim

# The dependencies are installed first, so that this layer stays cached when agent.py changes.
FROM ${PYTHON_IMAGE} AS dependencies
WORKDIR /app
COPY tests/requirements/agent.txt ./
RUN python -m venv --without-pip .venv \
    && pip --python .venv/bin/python install --no-cache-dir --quiet --require-hashes -r agent.txt

FROM ${PYTHON_IMAGE}
WORKDIR /app
COPY --from=dependencies /app/.venv .venv
COPY agent.py ./
# A clone may be readable by its owner only, and COPY keeps that.
RUN chmod 0644 agent.py
USER 65532:65532
ENTRYPOINT [".venv/bin/python", "agent.py"]
