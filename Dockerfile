# syntax=docker/dockerfile:1

# Two small images from one build: the worker (the default) and the sandbox that stands in for ElevenLabs.
#
#   docker build -t call-manager .
#   docker build -t elevenlabs-sandbox --target sandbox .

FROM rust:1.95-bookworm AS build
WORKDIR /build
COPY . .
# The cache mounts keep downloads and compiled dependencies between builds without a layer for them. They are no part of
# the image, so the binaries are copied out in the same step.
RUN --mount=type=cache,id=call-manager-registry,target=/usr/local/cargo/registry,sharing=locked \
    --mount=type=cache,id=call-manager-target,target=/build/target,sharing=locked \
    cargo build --release --locked --package call-manager --package elevenlabs-sandbox --bins \
    && install -D -t /out target/release/call-manager target/release/elevenlabs-sandbox \
    && mkdir /out/state

# The C library of the build stage's Debian release, the CA certificates TLS is verified against, and a user without
# rights (65532); no shell, no package manager.
FROM gcr.io/distroless/cc-debian12:nonroot AS runtime
STOPSIGNAL SIGTERM

FROM runtime AS sandbox
COPY --from=build /out/elevenlabs-sandbox /usr/local/bin/
EXPOSE 8400
ENTRYPOINT ["/usr/local/bin/elevenlabs-sandbox"]
CMD ["--listen", "0.0.0.0:8400", "--api-key", "sandbox-key"]

# Last, so that a build without --target makes it.
FROM runtime AS worker
COPY --from=build /out/call-manager /usr/local/bin/
# An empty directory the worker may write to, made here since this image has no mkdir.
COPY --from=build --chown=65532:65532 /out/state /var/lib/call-manager
# Also the working directory, so that a ledger named without one is in the volume too: it has to outlive the container,
# since it is what keeps a submit from being sent twice.
VOLUME /var/lib/call-manager
WORKDIR /var/lib/call-manager
# Text is for a terminal; a container's log goes to a collector.
ENV PORT=3099 LOG_FORMAT=json LEDGER_URL=sqlite:/var/lib/call-manager/ledger.db
EXPOSE 3099
# Ready means: connected to the broker and consuming.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["/usr/local/bin/call-manager", "healthcheck"]
ENTRYPOINT ["/usr/local/bin/call-manager"]
CMD ["worker"]
