"""The Fisher of one small digit network beside its Kronecker forms: E7, E8, E9."""
