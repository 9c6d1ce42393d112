"""Questions to models with adapters of PEFT."""

from peft import PeftModel


def own_parameters(model):
    """`(name, parameter)` of a base model without its adapters, by the names that they have without any."""
    adapter_prefix = getattr(model.base_model, "prefix", "lora_") if isinstance(model, PeftModel) else None
    for name, parameter in model.named_parameters():
        if adapter_prefix is not None:
            if adapter_prefix in name or ".modules_to_save." in name:
                continue
            name = (
                name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
            )
        yield name, parameter
