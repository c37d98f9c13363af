"""Installs npr_jax; the presets of `configs/` are shipped inside the package."""

from pathlib import Path

from setuptools import find_packages, setup

SERVE = ["starlette", "uvicorn", "h11", "prometheus-client", "typing_extensions"]

setup(
    name="npr-jax",
    version="0.1.0",
    description="Native Parallel Reasoner (arXiv 2512.07461) in pure JAX",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["npr_jax", "npr_jax.*"]), "npr_jax.configs"],
    package_dir={"npr_jax.configs": "configs"},
    package_data={
        "npr_jax": ["py.typed"],
        "npr_jax.configs": ["*.yaml", "**/*.yaml"],
        "npr_jax.report": ["*.js", "*.css"],
        "npr_jax.serve": ["*.html", "*.js", "*.css"],
    },
    install_requires=[
        "jax>=0.10.2,<0.13",
        "flax",
        "optax",
        "orbax-checkpoint",
        "transformers",
        "tensorflow-datasets",
        "grain",
        "numpy",
        "pyyaml",
        "pydantic>=2",
        "typer",
        "safetensors",
        "math-verify>=0.9,<0.10",
        "tensorboardX",
        "rich",
        "huggingface_hub",
        "tokenizers",
        "pyarrow",
        "jinja2",
    ],
    extras_require={
        "serve": SERVE,
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda13]"],
        "wandb": ["wandb"],
        "dev": [
            *("pytest", "pytest-xdist", "filelock", "hypothesis", "chex"),
            *("ruff", "pyright[nodejs]"),
            *SERVE,
        ],
    },
    entry_points={"console_scripts": ["npr-jax=npr_jax.cli:main"]},
)
