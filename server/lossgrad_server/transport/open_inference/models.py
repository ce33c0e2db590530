"""The models that the Open Inference service shows: which there are, and how they describe themselves.

One for each loss and for what goes in and comes out, so that a load generator that feeds every input and asks for every
output measures what the model's name says: `smooth_l1`, `smooth_l1_grad`, `smooth_l1_masked`, `smooth_l1_masked_grad`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from lossgrad_api.inference import messages
from lossgrad_server.errors import Code, Reason, RequestError
from lossgrad_server.jobs import DataType, LossKind

VERSION: Final = "1"
PLATFORM: Final = "torch_loss"  # of metadata and configuration: the losses are torch.nn's
BACKEND: Final = "lossgrad"

INPUT: Final = "INPUT"
TARGET: Final = "TARGET"
WEIGHT: Final = "WEIGHT"
MASK: Final = "MASK"
LOSS: Final = "LOSS"
COUNT: Final = "COUNT"
GRAD: Final = "GRAD"

# The protocol's names of the data types that are computed with or promoted.
DATA_TYPES: Final = {
    "FP16": DataType.FLOAT16,
    "BF16": DataType.BFLOAT16,
    "FP32": DataType.FLOAT32,
    "FP64": DataType.FLOAT64,
    "INT64": DataType.INT64,
    "INT32": DataType.INT32,
    "INT16": DataType.INT16,
    "INT8": DataType.INT8,
    "UINT8": DataType.UINT8,
    "BOOL": DataType.BOOL,
}
DATA_TYPE_NAMES: Final = {data_type: name for name, data_type in DATA_TYPES.items()}
# Those that the protocol knows and no loss is computed of.
UNUSED_DATA_TYPES: Final = frozenset(("UINT16", "UINT32", "UINT64", "BYTES"))

# Requests of priority 1, the default, go before those of this one.
BULK_PRIORITY: Final = 2

# What each loss calls the parameter that says where its quadratic part ends.
LOSS_PARAMETERS: Final = {LossKind.SMOOTH_L1: "beta", LossKind.HUBER: "delta"}


@dataclass(frozen=True)
class Tensor:
    """An input or output as a model's metadata shows it: -1 is any extent, the first dimension counts the rows."""

    name: str
    data_type: str
    shape: tuple[int, ...]
    is_optional: bool = False


@dataclass(frozen=True)
class Model:
    """One model: a loss, whether it takes weight and mask, and whether it gives the gradient."""

    kind: LossKind
    is_masked: bool = False
    has_gradient: bool = False

    @cached_property
    def name(self) -> str:
        """Its name on the wire."""
        return self.kind.name.lower() + ("_masked" if self.is_masked else "") + ("_grad" if self.has_gradient else "")

    @cached_property
    def inputs(self) -> tuple[Tensor, ...]:
        """What it takes."""
        inputs = [Tensor(INPUT, "FP32", (-1, -1)), Tensor(TARGET, "FP32", (-1, -1))]
        if self.is_masked:
            inputs.append(Tensor(WEIGHT, "FP32", (-1, -1), is_optional=True))
            inputs.append(Tensor(MASK, "BOOL", (-1, -1), is_optional=True))
        return tuple(inputs)

    @cached_property
    def outputs(self) -> tuple[Tensor, ...]:
        """What it gives, and all of it where a request names no outputs."""
        outputs = [Tensor(LOSS, "FP32", (-1, 1)), Tensor(COUNT, "INT64", (-1, 1))]
        if self.has_gradient:
            outputs.append(Tensor(GRAD, "FP32", (-1, -1)))
        return tuple(outputs)

    @cached_property
    def input_names(self) -> tuple[str, ...]:
        """The names of its inputs."""
        return tuple(tensor.name for tensor in self.inputs)

    @cached_property
    def output_names(self) -> tuple[str, ...]:
        """The names of its outputs."""
        return tuple(tensor.name for tensor in self.outputs)

    def with_input(self, name: str) -> Model | None:
        """Return the model that takes another input beside this one's; None where no model does."""
        return None if name not in (WEIGHT, MASK) else Model(self.kind, True, self.has_gradient)

    def with_output(self, name: str) -> Model | None:
        """Return the model that gives another output beside this one's; None where no model does."""
        return None if name != GRAD else Model(self.kind, self.is_masked, True)

    @cached_property
    def loss_parameter(self) -> str | None:
        """What it calls the end of the quadratic part; None where there is none."""
        return LOSS_PARAMETERS.get(self.kind)


MODELS: Final = {
    model.name: model
    for model in (
        Model(kind, is_masked, has_gradient)
        for kind in LossKind
        for is_masked in (False, True)
        for has_gradient in (False, True)
    )
}


def find_model(name: str, version: str) -> Model:
    """Return a model. Raises RequestError, NOT_FOUND."""
    model = MODELS.get(name)
    if model is None:
        raise RequestError(
            f"there is no model {name[:128]!r}; send one of {', '.join(MODELS)}",
            code=Code.NOT_FOUND,
            reason=Reason.UNKNOWN_MODEL,
            field="model_name",
        )
    if version not in ("", VERSION):
        raise RequestError(
            f"model {name} has no version {version[:128]!r}; send {VERSION!r}, or none for the newest",
            code=Code.NOT_FOUND,
            reason=Reason.UNKNOWN_MODEL,
            field="model_version",
        )
    return model


def metadata(model: Model) -> Any:
    """Return a ModelMetadataResponse."""
    tensors = [
        [{"name": tensor.name, "datatype": tensor.data_type, "shape": tensor.shape} for tensor in side]
        for side in (model.inputs, model.outputs)
    ]
    return messages().ModelMetadataResponse(
        name=model.name, versions=[VERSION], platform=PLATFORM, inputs=tensors[0], outputs=tensors[1]
    )


def configuration(model: Model, *, device: str, max_rows: int, max_queued_requests: int) -> Any:
    """Return a ModelConfigResponse. `device` is "cpu" or "cuda:N"; its dims leave the batch dimension out."""
    device_type, _, index = device.partition(":")
    instance = {"name": f"{model.name}_0", "count": 1, "kind": f"KIND_{'CPU' if device_type == 'cpu' else 'GPU'}"}
    if index:
        instance["gpus"] = [int(index)]
    texts = {"reduction": "sample_mean", "denominator": "the sum of the weights", "gradient_scale": "1"}
    if model.loss_parameter is not None:
        texts[model.loss_parameter] = "1"
    return messages().ModelConfigResponse(
        config={
            "name": model.name,
            "platform": PLATFORM,
            "backend": BACKEND,
            "max_batch_size": max_rows,
            "input": [
                {
                    "name": tensor.name,
                    "data_type": f"TYPE_{tensor.data_type}",
                    "dims": tensor.shape[1:],
                    # Requests of different extents are computed together, as they are: nothing is padded.
                    "allow_ragged_batch": True,
                    "optional": tensor.is_optional,
                }
                for tensor in model.inputs
            ],
            "output": [
                {"name": tensor.name, "data_type": f"TYPE_{tensor.data_type}", "dims": tensor.shape[1:]}
                for tensor in model.outputs
            ],
            "instance_group": [instance],
            # The batcher has no timer, and takes requests of every model and of the native service together.
            "dynamic_batching": {
                "priority_levels": BULK_PRIORITY,
                "default_priority_level": 1,
                "default_queue_policy": {"allow_timeout_override": True, "max_queue_size": max_queued_requests},
            },
            # What a request's parameters are where it does not set them.
            "parameters": {name: {"string_value": text} for name, text in texts.items()},
            "model_transaction_policy": {"decoupled": False},
        }
    )
