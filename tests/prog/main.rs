//! The packet programs through the kernel's test-run.
