//! Images of the pool in Docker's own store: the data-root of a daemon with the overlay2 driver.
//!
//! dockerd reads what images and layers there are when it starts, and knows better than its disk from
//! then on. So nothing of its own is written while it runs: [`record`] notes what is wanted in a
//! directory of ours inside the data-root, and [`apply`] makes the rest so while no daemon is there.
//! An image is a config, names, and a chain of layers; a layer is an entry of the layer database and a
//! directory of the driver, whose content (`diff`) is a link into this host's mount.
//!
//! What is ours tells so itself: a layer by its cache ID, an image by a file beside its metadata. Docker
//! takes both away with what they belong to, so that removal by Docker's own commands leaves nothing.
//! Whatever interrupts [`apply`], the next one ends what it began.

pub mod apply;
pub mod daemon;
mod driver;
mod files;
mod gone;
mod layers;
mod maps;
pub mod name;
pub mod plan;
pub mod record;
mod repositories;
pub mod root;
pub mod tarsplit;
pub mod watch;
