//! The `harbour` command: it joins the rooms.
//!
//! [`ingest`] carries an image from a source into the pool; [`node`] joins the mount to metad and
//! the pool; [`mover`] makes the copies that metad asks a donor for; [`container`] starts images without an engine, and
//! [`snapshotter`] serves containerd; [`commands`] holds one file per subcommand. Errors are typed in the rooms and become
//! a sentence, a next step and an exit code here ([`failure`]).
#![forbid(unsafe_code)]

pub mod advertise;
pub mod bounded;
pub mod cli;
pub mod commands;
pub mod config;
pub mod container;
pub mod docker;
pub mod donor;
pub mod failpoint;
pub mod failure;
pub mod ingest;
pub mod link;
pub mod mover;
pub mod node;
pub mod notify;
pub mod output;
pub mod progress;
pub mod setup;
pub mod size;
pub mod snapshotter;
pub mod stop;
pub mod waiting;
pub mod xattr;

use std::process::ExitCode;

use clap::Parser as _;

/// Parses the command line, runs the subcommand, and prints what went wrong with its causes.
pub fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    let verbose = cli.verbose;
    match commands::run(cli) {
        Ok(code) => code,
        Err(error) => failure::report(&error, verbose > 0),
    }
}
