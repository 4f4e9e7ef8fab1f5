//! Memory that hosts lend, and one-sided access to it.
pub mod transport;
