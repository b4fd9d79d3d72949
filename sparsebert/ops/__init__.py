"""The operations, one module each: contract, checks, choice of backend, and a plain reference `<op>_ref`.

Import the module you need (`from sparsebert.ops.sparse_matmul import sparse_matmul`): this package imports none of
them.
"""
