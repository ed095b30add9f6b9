"""The package. `kernels/` is installed as `miniplm.kernels`: a top-level module `kernels` would shadow the
PyPI package of that name, which transformers imports."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["miniplm", "miniplm.*"]), "miniplm.kernels"],
    package_dir={"miniplm.kernels": "kernels"},
    package_data={"miniplm": ["**/*.yaml", "**/*.jinja"]},
)
