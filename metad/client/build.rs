//! Generates messages, client and server from the contract, with no `protoc` on the machine.

use std::{error::Error, path::Path};

fn main() -> Result<(), Box<dyn Error>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../proto");
    let file = folder.join("harbour.proto");
    println!("cargo:rerun-if-changed={}", file.display());
    let descriptors = protox::compile([&file], [&folder])?;
    tonic_prost_build::configure()
        .emit_rerun_if_changed(false)
        // It carries tokens; `lib.rs` shows it without.
        .skip_debug([".harbour.v1.Region"])
        .compile_fds(descriptors)?;
    Ok(())
}
