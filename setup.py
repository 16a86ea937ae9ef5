"""Packaging: ranges here, the two tested sets in constraints/."""

from setuptools import find_packages, setup

REQUIRES = [
    "jax>=0.10.2,<0.13",
    "numpy>=2.0",
    "ml_dtypes>=0.5",
    "flax>=0.12.8,<0.13",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "ml_collections>=1.1,<2",
    "absl-py>=2.3",
    "etils[epath]>=1.15",
    "grain>=0.2.18,<0.3",
    "tokenizers>=0.22,<0.24",
    "jinja2>=3.1",
    "tensorboardX>=2.6.4,<3",
    "rich>=14",
    "matplotlib>=3.10",
    "jaxtyping>=0.3.3",
]

EXTRAS = {
    "test": [
        "pytest>=9.0",
        "pytest-xdist>=3.8",
        "hypothesis>=6.140",
        "beartype>=0.21",
        "import-linter>=2.5",
        "scipy>=1.14",
        "gguf>=0.19,<0.20",
        "safetensors>=0.6,<0.9",
        "nbclient>=0.10",
        "nbformat>=5.10",
        "ipykernel>=7.0",
        "tqdm>=4.66",
        "pyyaml>=6.0",
        "libtpu>=0.0.42,<0.1",
        "jax-cuda13-plugin>=0.11,<0.13; python_version >= '3.12'",  # the GPU compiler, without NVIDIA's libraries
        "ruff>=0.14,<0.18",
    ],
    "notebooks": ["nbclient>=0.10", "nbformat>=5.10", "ipykernel>=7.0", "tqdm>=4.66"],
    "tpu": ["jax[tpu]>=0.10.2,<0.13"],
    "aot": ["libtpu>=0.0.42,<0.1"],  # the TPU compiler on a machine without a TPU
    "gpu": ["jax[cuda13]>=0.11,<0.13; python_version >= '3.12'", "jax[cuda12]>=0.10.2,<0.11; python_version < '3.12'"],
    "hf": ["torch>=2.13", "transformers>=5.20,<6", "accelerate>=1.10"],
}

setup(
    name="kvattn",
    version="0.1.0",
    description="What an attention variant costs in quality and saves in KV-cache bytes, in JAX",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(
        include=[
            "kvattn",
            "kvattn.*",
            "sharding",
            "sharding.*",
            "pallas_kernels",
            "pallas_kernels.*",
            "configs",
            "experiments",
            "experiments.*",
        ]
    ),
    install_requires=REQUIRES,
    extras_require=EXTRAS,
)
