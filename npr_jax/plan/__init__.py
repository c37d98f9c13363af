"""What a stage would take on a TPU slice that is not there, told by the TPU compiler."""
