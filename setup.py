"""Package metadata, read from settings.ini so that it is written down once for pip and nbdev."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).resolve().parent
ini = ConfigParser()
ini.read(root / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]

extras = {name: cfg[f"{name}_requirements"].split() for name in ("dev", "minilm", "team", "peers", "strategies", "lora", "grid", "slurm", "paper")}

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"],
    author=cfg["author"],
    license={"apache2": "Apache-2.0"}[cfg["license"]],
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    package_data={cfg["lib_path"]: ["*.yml"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    zip_safe=False,
)
