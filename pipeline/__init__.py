"""The stages around the method: prepare, pretrain, evaluate, tune, export. The only place that knows Ray and MLflow."""
