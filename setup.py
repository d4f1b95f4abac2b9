"""Packages of kd_d2 and the configs shipped with it; all other settings are in pyproject.toml."""

from setuptools import find_packages, setup

SHIPPED = {
    "configs": ["*.yaml", "demo/*.yaml", "recommended/*.yaml", "tiny/*.yaml"],
    "projects": ["*/configs/*.yaml"],
}

setup(
    packages=[*find_packages(include=["kd_d2*"]), *(f"kd_d2.share.{folder}" for folder in SHIPPED)],
    package_dir={f"kd_d2.share.{folder}": folder for folder in SHIPPED},
    package_data={f"kd_d2.share.{folder}": files for folder, files in SHIPPED.items()}
    | {"kd_d2": ["py.typed"], "kd_d2.report": ["*.jinja"]},
    include_package_data=False,
)
