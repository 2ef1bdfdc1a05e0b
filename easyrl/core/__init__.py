"""What everything else stands on: configuration, meshes, parameter descriptions, masks, errors."""
