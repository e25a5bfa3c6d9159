from setuptools import setup
from torch.utils.cpp_extension import BuildExtension

from hyperopt_ext.extension import rule_extension

setup(
    name="hyperopt_adamax",
    version="1.0",
    packages=["hyperopt_adamax"],
    install_requires=["hyperopt_ext"],
    ext_modules=[rule_extension("hyperopt_adamax._rules", ["hyperopt_adamax/adamax.h"])],
    cmdclass={"build_ext": BuildExtension},
)
