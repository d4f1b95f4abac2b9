# syntax=docker/dockerfile:1
# kd_d2 for GPUs: official Detectron2 with its CUDA operators, entry point kd-d2.
#
#   docker build -t kd_d2 .
#   mkdir -p output
#   docker run --gpus all --shm-size 8g --user "$(id -u):$(id -g)" -v "$PWD/datasets:/work/datasets" -v "$PWD/output:/work/output" kd_d2 \
#       train StructuralKD/retinanet_R101-R50_ssim --num-gpus 8
#
# Paths are relative to /work, which has the files of a checkout. cluster/README.md: one box, Kubernetes, Slurm.

# CUDA's version is that of the torch wheel in requirements/torch-source.txt; Ubuntu 24.04 has Python 3.12.
ARG CUDA=13.0.2
ARG UBUNTU=ubuntu24.04
# Base images are pinned by digest, since tags can change. Digests take precedence over tags: another CUDA or UBUNTU needs its own, or empty ones.
#   docker buildx imagetools inspect nvidia/cuda:13.0.2-devel-ubuntu24.04 --format '{{.Manifest.Digest}}', and the same of -base-
#   docker build --build-arg DEVEL_DIGEST=@sha256:... --build-arg BASE_DIGEST=@sha256:... -t kd_d2 .
ARG DEVEL_DIGEST=@sha256:5dc1bca23d05bd37b011be68ec470c03b403a5da07ec3a86e41af9470e9d0cc6
ARG BASE_DIGEST=@sha256:2ab6381d970b211fb93853796dc6707eb8a72575a375c422b17cf4d8b2641701

FROM nvidia/cuda:${CUDA}-devel-${UBUNTU}${DEVEL_DIGEST} AS build
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git ninja-build python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /work
# Packages first, each with its file hash: they change less often than the code.
COPY requirements/lock-image.txt requirements/imagecorruptions.txt requirements/
RUN python3 -m venv "$VIRTUAL_ENV" \
    && awk '/^[a-zA-Z]/ { wanted = /^(pip|setuptools)==/ } wanted' requirements/lock-image.txt >/tmp/builders.txt \
    && pip install --require-hashes --no-deps -r /tmp/builders.txt \
    && pip install --require-hashes --no-deps --no-build-isolation -r requirements/lock-image.txt \
    && pip install --require-hashes --no-deps -r requirements/imagecorruptions.txt
# Turing to Blackwell; --build-arg TORCH_CUDA_ARCH_LIST=9.0 builds only for an H100, in a fraction of the time.
ARG TORCH_CUDA_ARCH_LIST="7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"
ARG DETECTRON2=git+https://github.com/facebookresearch/detectron2@02b5c4e295e990042a714712c21dc79b731e8833
# hadolint ignore=DL3013
RUN FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="$TORCH_CUDA_ARCH_LIST" pip install --no-deps --no-build-isolation "$DETECTRON2"
COPY . .
# The modes are those of the checkout, which the umask of its user may have closed to others.
RUN chmod -R a+rX . \
    && pip install --no-deps --no-build-isolation --editable . \
    && python cluster/check_install.py --operators

FROM nvidia/cuda:${CUDA}-base-${UBUNTU}${BASE_DIGEST}
# On a GPU, the SSIM loss and torch.compile use Triton, which compiles its launchers on first use: the runtime image needs a C compiler
# and Python's headers.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3 python3-dev tini \
    && rm -rf /var/lib/apt/lists/* \
    && (userdel --remove ubuntu || true) \
    && useradd --uid 1000 --create-home kd_d2 \
    && install --directory --owner=1000 --mode=0777 /work /work/datasets /work/output
COPY --from=build /opt/venv /opt/venv
COPY --from=build --chown=1000:1000 /work /work
# Caches are in the output volume, which a user without a home directory can also write to.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    XDG_CACHE_HOME=/work/output/.cache \
    FVCORE_CACHE=/work/output/.cache/fvcore \
    TRITON_CACHE_DIR=/work/output/.cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/work/output/.cache/inductor \
    MPLCONFIGDIR=/tmp/matplotlib
WORKDIR /work
# The image is checked as a user that owns none of its files, and without the cache folders of the check, to which no other could write.
USER 12345
RUN python cluster/check_install.py --operators \
    && rm -rf "$XDG_CACHE_HOME" "$MPLCONFIGDIR"
USER 1000
VOLUME ["/work/datasets", "/work/output"]
# The kernel drops signals that the first process of a container does not handle; tini passes them on to a process that they end.
ENTRYPOINT ["tini", "--", "kd-d2"]
CMD ["--help"]
