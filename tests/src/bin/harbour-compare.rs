//! `harbour-compare [--overlay] [--limit N] A B`: says whether two directory trees are the same.
//! Exit code 0 when they are, 1 when not, 2 when they could not be read.
#![allow(clippy::print_stdout)]

use std::{path::Path, process::ExitCode};

use anyhow::{Context, Result, bail};
use harbour_tests::tree::{Links, Report, Rules, Tree};

fn main() -> ExitCode {
    match run(std::env::args().skip(1)) {
        Ok((report, limit)) => {
            for difference in report.differences.iter().take(limit) {
                println!("{difference}");
            }
            println!(
                "{} names, {} bytes, {} differences",
                report.entries,
                report.bytes,
                report.differences.len()
            );
            ExitCode::from(u8::from(!report.differences.is_empty()))
        }
        Err(error) => {
            eprintln!("harbour-compare: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(mut args: impl Iterator<Item = String>) -> Result<(Report, usize)> {
    let (mut rules, mut limit, mut trees) = (Rules::default(), 20, Vec::new());
    while let Some(arg) = args.next() {
        match arg.as_str() {
            // An overlay of several layers tells link counts of its own.
            "--overlay" => {
                rules = Rules {
                    links: Links::Names,
                    dir_links: false,
                    ..rules
                }
            }
            "--limit" => {
                limit = args
                    .next()
                    .context("--limit wants a number")?
                    .parse()
                    .context("--limit")?
            }
            _ => trees.push(arg),
        }
    }
    let [a, b] = trees.as_slice() else {
        bail!("usage: harbour-compare [--overlay] [--limit N] A B")
    };
    let (a, b) = (Tree::scan(Path::new(a))?, Tree::scan(Path::new(b))?);
    Ok((a.compare(&b, &rules)?, limit))
}
