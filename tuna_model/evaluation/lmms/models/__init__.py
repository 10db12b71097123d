"""The models that lmms-eval finds here: name -> class, in the module of that name."""

AVAILABLE_MODELS = {"tuna": "Tuna"}
