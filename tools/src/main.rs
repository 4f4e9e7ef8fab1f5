//! `harbour`: one binary, many subcommands. See `harbour --help`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    harbour::main()
}
