"""The science: digits, the CNN, its training and evaluation, and the promotion rules.

Imports torch, torchvision, numpy, scipy, scikit-learn and pydantic; knows nothing of Prefect,
MLflow, S3 or Great Expectations.
"""
