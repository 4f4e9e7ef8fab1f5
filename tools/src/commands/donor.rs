//! `harbour donor`: memory of this host for the pool.

use std::{net::SocketAddr, path::Path, process::ExitCode, time::Duration};

use harbour_metad_client::{Client, Error as ClientError, v1};
use harbour_pool::{
    HugePages,
    donor::{DonorConfig, DonorServer},
    tcp,
    token::Token,
    transport::RegionInfo,
    verbs,
};

use super::{Context, daemon};
use crate::{
    advertise::{self, Advertised},
    cli::DonorArgs,
    config,
    stop::Stop,
};

/// How long metad may take for a heartbeat before it is asked again.
const RETRY: Duration = Duration::from_millis(250);

pub(super) fn run(context: &Context, args: DonorArgs) -> anyhow::Result<ExitCode> {
    daemon::follow_parent(args.supervised)?;
    context.places.create()?;
    let _pid = daemon::PidFile::take(context, "donor")?;
    let keys = args.keys.over(context.file.donor.clone());
    let lend = keys.lend_bytes()?;
    let name = keys.donor_name.clone().unwrap_or_else(config::host_name);
    let huge = match keys.huge_pages.unwrap_or(config::HugePages::Auto) {
        config::HugePages::Auto => HugePages::Auto,
        config::HugePages::Never => HugePages::Never,
        config::HugePages::Require => HugePages::Require,
    };
    let socket = context.places.donor_socket();
    let network = Network::of(args.listen, args.advertise, &keys);
    let server = DonorServer::start(DonorConfig {
        huge,
        listen: network.listen,
        ..DonorConfig::new(&name, &socket, lend)
    })?;
    let sockets = advertise::sockets(server.listening(), &network.advertise, &context.endpoint()?)?;
    let donor = v1::Donor {
        name: name.clone(),
        epoch: server.epoch(),
        addresses: addresses(&server, &sockets),
        regions: regions(&server),
        ..v1::Donor::default()
    };
    let replaces = Predecessor::replace(&context.places.donor_epoch(), server.epoch());
    context.runtime()?.block_on(async {
        let stop = Stop::on_signals()?;
        let Some(client) = context.patient_client(&stop).await? else {
            return Ok(());
        };
        keep_lease(&client, &donor, replaces, &stop).await;
        anyhow::Ok(())
    })?;
    drop(server);
    Ok(ExitCode::SUCCESS)
}

/// Where a donor is to be reached from other hosts.
struct Network {
    listen: Vec<SocketAddr>,
    advertise: Vec<Advertised>,
}

impl Network {
    /// What the flags say, else what the file says.
    fn of(listen: Vec<SocketAddr>, advertise: Vec<Advertised>, keys: &config::DonorKeys) -> Self {
        fn or<T: Clone>(flags: Vec<T>, key: &Option<Vec<T>>) -> Vec<T> {
            match key {
                Some(key) if flags.is_empty() => key.clone(),
                _ => flags,
            }
        }
        Self {
            listen: or(listen, &keys.listen),
            advertise: or(advertise, &keys.advertise),
        }
    }
}

/// How readers find the donor, on this host and on others.
fn addresses(server: &DonorServer, sockets: &[SocketAddr]) -> Vec<String> {
    let mut addresses = vec![server.address()];
    addresses.extend(harbour_pool::host::id().map(|id| harbour_pool::host::address_of(&id)));
    // Its queue pairs are set up over the same sockets.
    let rdma = server.rdma_addresses();
    let verbs = sockets.iter().filter(|socket| rdma.contains(&socket.ip()));
    addresses.extend(verbs.map(|socket| verbs::address_of(*socket)));
    addresses.extend(sockets.iter().map(|socket| tcp::address_of(*socket)));
    addresses
}

/// What it lends, with the tokens that metad gives to those who may have them.
fn regions(server: &DonorServer) -> Vec<v1::Region> {
    let keys = server.keys();
    let token = |token: Option<Token>| token.map_or_else(Vec::new, |token| token.0.to_vec());
    let region = |region: &RegionInfo| {
        let key = keys.iter().find(|key| key.region == region.id);
        v1::Region {
            id: region.id.0,
            len: region.len,
            huge_pages: region.huge_pages,
            read_token: token(key.and_then(|key| key.read)),
            write_token: token(key.and_then(|key| key.write)),
        }
    };
    server.regions().iter().map(region).collect()
}

/// The donor that had this run directory before. The pid file is held, so it is dead.
#[derive(Clone, Copy)]
struct Predecessor {
    /// Its epoch; 0 when there was none, or when that is not known.
    epoch: u64,
}

impl Predecessor {
    /// Reads who was there and writes down who is. Without the file metad waits for a lease to end.
    fn replace(file: &Path, epoch: u64) -> Self {
        let before = std::fs::read_to_string(file).unwrap_or_default();
        if let Err(error) = std::fs::write(file, format!("{epoch:x}\n")) {
            tracing::warn!(%error, file = %file.display(), "the next donor here will have to wait for this one's lease");
        }
        Self {
            epoch: u64::from_str_radix(before.trim(), 16).unwrap_or(0),
        }
    }
}

/// Registers, renews, and registers again whenever metad has forgotten us; leaves at the end.
async fn keep_lease(client: &Client, donor: &v1::Donor, replaces: Predecessor, stop: &Stop) {
    let mut id = None;
    loop {
        let answer = match id {
            None => {
                client
                    .register_donor(v1::RegisterDonorRequest {
                        donor: Some(donor.clone()),
                        replaces_epoch: replaces.epoch,
                    })
                    .await
            }
            Some(id) => {
                let reference = Some(v1::DonorRef {
                    id,
                    epoch: donor.epoch,
                });
                client
                    .donor_heartbeat(v1::DonorHeartbeat { donor: reference })
                    .await
            }
        };
        let pause = match answer {
            Ok(lease) => {
                if id.replace(lease.id).is_none() {
                    tracing::info!(donor = lease.id, "registered with metad");
                }
                Duration::from_millis(u64::from(lease.lease_ms) / 3).max(Duration::from_millis(50))
            }
            Err(error) => {
                if !matches!(
                    error,
                    ClientError::Unavailable { .. } | ClientError::Deadline { .. }
                ) {
                    tracing::warn!(%error, "metad does not take this donor; asking again");
                    id = None;
                }
                RETRY
            }
        };
        if stop.within(pause).await {
            break;
        }
    }
    if let Some(id) = id {
        let leaving = client.donor_leave(v1::DonorRef {
            id,
            epoch: donor.epoch,
        });
        let _ = tokio::time::timeout(Duration::from_secs(2), leaving).await;
    }
}
