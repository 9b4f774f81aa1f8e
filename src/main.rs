//! The `gradwire` command. Everything it does lives in the library's `cli` module; this file only hands over.
//!
//! Invariant: no logic here.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    gradwire::cli::main()
}
