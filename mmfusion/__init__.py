"""mmfusion: experiments in multimodal product search."""
