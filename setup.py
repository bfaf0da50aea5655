"""Packaging of `icl`; the settings of the tools are in pyproject.toml."""

from hashlib import sha256
from pathlib import Path

from setuptools import Extension, find_packages, setup

_KERNEL = "icl/model/attention.cpp"
_DIGEST = sha256(Path(_KERNEL).read_bytes()).hexdigest()
_FLAGS = ["-std=c++17", "-O3", "-fopenmp", "-fno-exceptions", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]

# Attention kernel for CPUs. If there is no compiler, `icl` is installed without this kernel and uses PyTorch's
# operations. The kernel needs no headers of Python or PyTorch. It is not linked with OpenMP, because PyTorch has already
# loaded an OpenMP library.
tiny_attention = Extension(
    "icl.model._attention",
    sources=[_KERNEL],
    language="c++",
    define_macros=[("SOURCE", f'"{_DIGEST}"')],
    extra_compile_args=_FLAGS,
    optional=True,
)

setup(
    name="icl",
    version="0.1.0",
    description="Train small transformers on in-context linear regression and study how they develop.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["icl", "icl.*"]),
    ext_modules=[tiny_attention],
    package_data={"icl.report": ["page.html", "page.css"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.9,<2.14",
        "lightning>=2.6,!=2.6.2,!=2.6.3,<3",
        "torchmetrics>=1.4",
        "wandb>=0.27",
        "numpy>=1.26",
        "python-dotenv>=1.0",
        "boto3>=1.36",
        "pyyaml>=6.0",
        "jsonargparse[signatures]>=4.37,<5",
        "safetensors>=0.4.3",
        "jaxtyping>=0.2.34",
        "scipy>=1.11",
        "scikit-learn>=1.4",
        "pandas>=2.1",
        "matplotlib>=3.8",
        "pillow>=10",
        "jinja2>=3.1",
        "tqdm>=4.66",
        "tensorboardX>=2.6",
    ],
    extras_require={
        "bench": ["devinterp==1.3.2"],
        "hub": ["huggingface_hub>=1.0"],
        "language": ["tokenizers>=0.20", "datasets>=3", "huggingface_hub>=1.0"],
        "lens": ["transformer-lens>=2,<4"],
        "arviz": ["arviz-base>=0.8; python_version >= '3.11'"],
        "tpu": ["torch==2.9.*", "torch_xla[tpu]==2.9.*"],
        "notebooks": ["jupyterlab>=4", "nbclient>=0.10", "nbformat>=5.10", "ipykernel>=6.29"],
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "beartype>=0.18",
            "ruff>=0.6",
            "mypy>=1.11",
            "types-PyYAML",
            "arviz-stats>=0.8; python_version >= '3.11'",
            "arviz-base>=0.8; python_version >= '3.11'",
            "moto[server]>=5",
            "msgpack>=1",
            "tokenizers>=0.20",
            "huggingface_hub>=1.0",
            "nbclient>=0.10",
            "nbformat>=5.10",
            "ipykernel>=6.29",
            "playwright>=1.49",
            "pre-commit>=3.7",
            "mkdocs>=1.6,<2",
            "mkdocs-material>=9.5,<10",
            "mkdocstrings[python]>=0.26",
        ],
    },
    # An editable install adds a path instead of an import hook. Python searches paths before it asks an import hook.
    # So in the folder that contains a clone named `icl`, `import icl` would import the clone's folder, not the package.
    options={"editable_wheel": {"mode": "compat"}},
    entry_points={"console_scripts": ["icl=icl.cli:main"]},
)
