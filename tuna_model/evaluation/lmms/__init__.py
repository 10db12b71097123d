"""lmms-eval drives the model through this plugin:

    LMMS_EVAL_PLUGINS=tuna_model.evaluation.lmms python -m lmms_eval --model tuna \\
        --model_args pretrained=DIR,store=grpc://HOST:PORT/NAME --tasks pope
"""
