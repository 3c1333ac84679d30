"""The public names, which research code imports from the package `distil_jax` itself."""

# Configurations.
from distil_jax.config.model import HeadConfig as HeadConfig
from distil_jax.config.model import ModelConfig as ModelConfig
from distil_jax.config.objective import LossConfig as LossConfig
from distil_jax.config.objective import MaskingConfig as MaskingConfig
from distil_jax.config.objective import TaskLossConfig as TaskLossConfig
from distil_jax.config.run import Config as Config
from distil_jax.config.run import MeshConfig as MeshConfig
from distil_jax.config.step import Objective as Objective
from distil_jax.config.step import Optimizer as Optimizer
from distil_jax.config.step import OptimizerConfig as OptimizerConfig
from distil_jax.config.step import StepConfig as StepConfig

# Models.
from distil_jax.models.encoder import MaskedLm as MaskedLm
from distil_jax.models.encoder import abstract_params as abstract_params
from distil_jax.models.encoder import count_parameters as count_parameters
from distil_jax.models.encoder import init_params as init_params
from distil_jax.models.encoder import layers_apart as layers_apart
from distil_jax.models.heads import TaskModel as TaskModel
from distil_jax.models.heads import abstract_task_params as abstract_task_params
from distil_jax.models.heads import init_task_params as init_task_params
from distil_jax.models.heads import with_fresh_head as with_fresh_head
from distil_jax.models.student import choose_layers as choose_layers
from distil_jax.models.student import student_from_teacher as student_from_teacher

# The objective.
from distil_jax.objective.distillation import Distillation as Distillation
from distil_jax.objective.distillation import LogitsFromBatch as LogitsFromBatch
from distil_jax.objective.distillation import at_targets as at_targets
from distil_jax.objective.distillation import distill_loss as distill_loss
from distil_jax.objective.losses import cosine_loss as cosine_loss
from distil_jax.objective.losses import kl_loss as kl_loss
from distil_jax.objective.losses import mlm_loss as mlm_loss
from distil_jax.objective.losses import mse_loss as mse_loss
from distil_jax.objective.masking import mask_tokens as mask_tokens
from distil_jax.objective.masking import masking_weights as masking_weights
from distil_jax.objective.tasks import TaskObjective as TaskObjective
from distil_jax.objective.vocabulary import logits as logits

# Errors and data structures.
from distil_jax.schema import InputError as InputError
from distil_jax.structs import IGNORED as IGNORED
from distil_jax.structs import PADDING_LOGIT as PADDING_LOGIT
from distil_jax.structs import Batch as Batch
from distil_jax.structs import Encoded as Encoded
from distil_jax.structs import Head as Head
from distil_jax.structs import Mean as Mean
from distil_jax.structs import Metrics as Metrics
from distil_jax.structs import Rows as Rows

# Training.
from distil_jax.training.optimizer import learning_rate as learning_rate
from distil_jax.training.optimizer import make_optimizer as make_optimizer
from distil_jax.training.optimizer import muon_dimension_numbers as muon_dimension_numbers
from distil_jax.training.sharding import jit_eval as jit_eval
from distil_jax.training.sharding import jit_step as jit_step
from distil_jax.training.sharding import make_mesh as make_mesh
from distil_jax.training.sharding import put_rows as put_rows
from distil_jax.training.sharding import shardings_of as shardings_of
from distil_jax.training.state import TrainState as TrainState
from distil_jax.training.state import abstract_state as abstract_state
from distil_jax.training.state import init_state as init_state
from distil_jax.training.step import apply_gradients as apply_gradients
from distil_jax.training.step import eval_step as eval_step
from distil_jax.training.step import gradients as gradients
from distil_jax.training.step import mask_and_eval_step as mask_and_eval_step
from distil_jax.training.step import mask_and_train_step as mask_and_train_step
from distil_jax.training.step import task_eval_step as task_eval_step
from distil_jax.training.step import train_step as train_step
