# One image for everything of ours in the stack: sandbox, worker, beat, relay. Compose says which one a container is.

FROM python:3.12-slim AS build
WORKDIR /src
RUN python -m venv --without-pip /venv
# The dependencies, for a package that is still empty: a changed module does not fetch them again.
COPY pyproject.toml ./
RUN mkdir xpander_celery && touch README.md LICENSE xpander_celery/__init__.py \
    && python -m pip --python /venv/bin/python install --no-cache-dir '.[agno,otlp,redis,sandbox]'
COPY README.md LICENSE ./
COPY xpander_celery xpander_celery
RUN python -m pip --python /venv/bin/python install --no-cache-dir --no-deps --force-reinstall .

FROM python:3.12-slim
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
# A new named volume takes the owner and mode of the directory that it is mounted on.
RUN useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin xpander \
    && install -d -o xpander -g xpander -m 0700 /var/lib/xpander-celery /var/lib/sandbox
COPY --from=build /venv /venv
WORKDIR /app
COPY examples examples
USER xpander
CMD ["xpander-celery", "--help"]
