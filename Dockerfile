# This repository in /l2s_jax, with JAX for TPUs: the image of launch/gke.yaml, and with JAX for the
# servers' machines that of launch/k8s-serve.yaml.
#
#   docker build --tag IMAGE . && docker push IMAGE
#
# For NVIDIA GPUs: --build-arg 'JAX=jax[cuda13]'. For CPUs: --build-arg JAX=jax.
FROM python:3.11-slim

ARG JAX=jax[tpu]
WORKDIR /l2s_jax

# JAX, the largest part, is in a layer of its own, which a change of the code leaves as it is.
COPY constraints.txt .
RUN pip install --no-cache-dir -c constraints.txt "$JAX"

COPY . .
RUN pip install --no-cache-dir -c constraints.txt -e '.[gs,s3,serve]'

ENTRYPOINT ["l2s-jax"]
CMD ["--help"]
