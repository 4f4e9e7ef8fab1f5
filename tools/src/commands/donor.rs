//! `harbour donor`: memory of this host for the pool.

use std::{
    net::SocketAddr,
    path::Path,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;

use harbour_metad_client::{Client, Error as ClientError, v1};
use harbour_pool::{
    HugePages,
    donor::{DonorConfig, DonorServer},
    tcp,
    token::Token,
    transport::RegionInfo,
    verbs::{self, Devices},
};
use tokio::sync::Notify;

use super::{Context, daemon};
use crate::{
    advertise::{self, Advertised},
    cli::DonorArgs,
    config::{self, Lend},
    donor::{
        keeper::Keeper,
        policy::{Limits, Reading, may_lend},
        readings::Host,
    },
    failure::{self, Code},
    mover::Mover,
    notify,
    size::Size,
    stop::Stop,
};

/// How long metad may take for a heartbeat before it is asked again.
const RETRY: Duration = Duration::from_millis(250);

pub(super) fn run(context: &Context, args: DonorArgs) -> anyhow::Result<ExitCode> {
    daemon::follow_parent(args.supervised)?;
    context.places.create()?;
    let _pid = daemon::PidFile::take(context, "donor")?;
    let keys = args.keys.over(context.file.donor.clone());
    let name = keys.donor_name.clone().unwrap_or_else(config::host_name);
    let huge = match keys.huge_pages.unwrap_or(config::HugePages::Auto) {
        config::HugePages::Auto => HugePages::Auto,
        config::HugePages::Never => HugePages::Never,
        config::HugePages::Require => HugePages::Require,
    };
    let socket = context.places.donor_socket();
    let ways = context.ways(keys.transport, keys.rdma_device.as_ref())?;
    let network = Network::of(args.listen, args.advertise, &keys);
    let lending = Lending::of(&keys)?;
    let huge = lending.huge(huge);
    let server = Arc::new(DonorServer::start(DonorConfig {
        huge,
        listen: network.listen,
        lock: keys.lock_memory == Some(true),
        // What is under no TLS may not carry what is to be under it.
        rdma: if ways.veiled_only {
            Devices::Off
        } else {
            ways.devices.clone()
        },
        veil: ways.veil.clone().filter(|_| ways.veiled_only),
        ..DonorConfig::new(&name, &socket, lending.at_first)
    })?);
    let changed = Arc::new(Notify::new());
    let keeper = lending.keep(&server, &changed)?;
    let sockets = advertise::sockets(server.listening(), &network.advertise, &context.endpoint()?)?;
    let donor = v1::Donor {
        name: name.clone(),
        epoch: server.epoch(),
        failure_domain: keys
            .failure_domain
            .clone()
            .unwrap_or_else(config::host_name),
        addresses: addresses(&server, &sockets, context.places.tls_data),
        ..v1::Donor::default()
    };
    let replaces = Predecessor::replace(&context.places.donor_epoch(), server.epoch());
    context.runtime()?.block_on(async {
        let stop = Stop::on_signals()?;
        let Some(client) = context.patient_client(&stop).await? else {
            return Ok(());
        };
        let mut lease = Lease::new(
            &client,
            &server,
            donor,
            replaces,
            Mover::start(&client, &ways),
        );
        lease.keep(&changed, &stop).await;
        if let (Some(limit), Some(id)) = (keys.drain(), lease.id) {
            if let Some(keeper) = &keeper {
                keeper.leave();
            }
            // A second signal ends it at once.
            let again = Stop::on_signals()?;
            lease.drain(id, limit, &again).await;
        }
        lease.leave().await;
        anyhow::Ok(())
    })?;
    drop(keeper);
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
fn addresses(server: &DonorServer, sockets: &[SocketAddr], veiled: bool) -> Vec<String> {
    let mut addresses = vec![server.address()];
    addresses.extend(harbour_pool::host::id().map(|id| harbour_pool::host::address_of(&id)));
    // Its queue pairs are set up over the same sockets.
    let rdma = server.rdma_addresses();
    let verbs = sockets.iter().filter(|socket| rdma.contains(&socket.ip()));
    addresses.extend(verbs.map(|socket| verbs::address_of(*socket)));
    addresses.extend(
        sockets
            .iter()
            .map(|socket| tcp::address_of(*socket, veiled)),
    );
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

/// How much is lent at first, and between which bounds.
struct Lending {
    at_first: u64,
    limits: Limits,
    /// Memory goes back under pressure.
    yields: bool,
    auto: bool,
}

impl Lending {
    fn of(keys: &config::DonorKeys) -> anyhow::Result<Self> {
        let host = Host::new(Path::new("/"));
        let auto = keys.lend == Some(Lend::Auto);
        let fixed = keys.lend_fixed == Some(true);
        let (Some(total), Some(available)) = (host.total(), host.available()) else {
            anyhow::bail!("/proc/meminfo does not say how much memory there is and is available");
        };
        let limits = keys.limits(total, available)?;
        if auto && (fixed || keys.huge_pages == Some(config::HugePages::Require)) {
            return Err(failure::failure(
                Code::Usage,
                "--lend auto lends and takes back ordinary pages",
                "leave out --lend-fixed and --huge-pages require, or name a size",
            ));
        }
        let reading = Reading {
            available,
            stalled: None,
            lent: 0,
            held: 0,
        };
        let may = may_lend(reading, limits);
        // What a moment shows may be needed in the next: the keeper adds the rest.
        let wanted = if auto { may / 2 } else { limits.most };
        let at_first = if fixed { wanted } else { wanted.min(may) };
        if at_first < limits.most && !auto {
            tracing::warn!(
                wanted = %Size(limits.most), lent = %Size(at_first), kept = %Size(limits.floor),
                "the host cannot spare what was asked for now: the rest is lent when it can (--keep-free is what it keeps)"
            );
        }
        Ok(Self {
            at_first: at_first.max(limits.unit.min(limits.most)),
            limits,
            yields: !fixed,
            auto,
        })
    }

    /// Huge pages cannot be given back to the host in a way that helps it: they stay huge pages.
    fn huge(&self, wanted: HugePages) -> HugePages {
        if self.auto { HugePages::Never } else { wanted }
    }

    /// Starts giving back and taking up, where that is wanted and possible.
    fn keep(
        &self,
        server: &Arc<DonorServer>,
        changed: &Arc<Notify>,
    ) -> anyhow::Result<Option<Keeper>> {
        if !self.yields {
            return Ok(None);
        }
        if server.regions().iter().any(|region| region.huge_pages) {
            tracing::info!(
                "lends huge pages, which the host has set aside: they are not given back under pressure"
            );
            return Ok(None);
        }
        let keeper = Keeper::start(Arc::clone(server), self.limits, Arc::clone(changed));
        Ok(Some(keeper.context("cannot watch the host's memory")?))
    }
}

/// This donor as metad knows it.
struct Lease<'a> {
    client: &'a Client,
    server: &'a DonorServer,
    donor: v1::Donor,
    replaces: Predecessor,
    mover: Mover,
    id: Option<u64>,
    /// Regions that metad knows of.
    told: Vec<v1::Region>,
}

impl<'a> Lease<'a> {
    fn new(
        client: &'a Client,
        server: &'a DonorServer,
        donor: v1::Donor,
        replaces: Predecessor,
        mover: Mover,
    ) -> Self {
        Self {
            client,
            server,
            donor,
            replaces,
            mover,
            id: None,
            told: Vec::new(),
        }
    }

    /// Registers, renews, tells what came and went, and registers again whenever metad has
    /// forgotten us, until this process is to end.
    async fn keep(&mut self, changed: &Notify, stop: &Stop) {
        loop {
            let asked = Instant::now();
            let pause = match self.tell(false).await {
                Ok(lease) => {
                    self.mover.take(self.donor.epoch, &lease, asked);
                    if self.id.replace(lease.id).is_none() {
                        tracing::info!(donor = lease.id, "registered with metad");
                        notify::ready();
                    }
                    Duration::from_millis(u64::from(lease.lease_ms) / 3)
                        .max(Duration::from_millis(50))
                }
                Err(error) => {
                    if !passing(&error) {
                        tracing::warn!(%error, "metad does not take this donor; asking again");
                        self.id = None;
                    }
                    RETRY
                }
            };
            // What was told just now may have been less than all.
            let pause = if self.resize(false).is_some() && self.id.is_some() {
                pause.min(RETRY)
            } else {
                pause
            };
            tokio::select! {
                over = stop.within(pause) => if over { return },
                () = changed.notified() => {}
            }
        }
    }

    /// One call: the one that metad needs next.
    async fn tell(&mut self, draining: bool) -> Result<v1::DonorLease, ClientError> {
        let Some(id) = self.id else {
            if self.told.is_empty() {
                self.told = regions(self.server);
            }
            // Regions that went since are named once more: what lies in them is known to metad, which
            // would take us for a donor that lost its memory.
            let donor = v1::Donor {
                regions: self.told.clone(),
                ..self.donor.clone()
            };
            let request = v1::RegisterDonorRequest {
                donor: Some(donor),
                replaces_epoch: self.replaces.epoch,
            };
            return self.client.register_donor(request).await;
        };
        let donor = Some(v1::DonorRef {
            id,
            epoch: self.donor.epoch,
        });
        let Some(request) = self.resize(draining) else {
            return self
                .client
                .donor_heartbeat(v1::DonorHeartbeat { donor })
                .await;
        };
        let request = v1::ResizeDonor { donor, ..request };
        let lease = self.client.donor_resize(request.clone()).await?;
        self.told
            .retain(|region| !request.retired.contains(&region.id));
        self.told.extend(request.added);
        Ok(lease)
    }

    /// What metad does not know yet of what came and went, if anything.
    fn resize(&self, draining: bool) -> Option<v1::ResizeDonor> {
        let now = regions(self.server);
        let without = |some: &[v1::Region], others: &[v1::Region]| -> Vec<v1::Region> {
            let known = |id| others.iter().any(|other| other.id == id);
            some.iter()
                .filter(|region| !known(region.id))
                .cloned()
                .collect()
        };
        let added = without(&now, &self.told);
        let retired = without(&self.told, &now);
        let something = draining || !added.is_empty() || !retired.is_empty();
        something.then(|| v1::ResizeDonor {
            donor: None,
            added,
            retired: retired.iter().map(|region| region.id).collect(),
            draining,
        })
    }

    /// Lends nothing new and waits until nothing is left that only this donor has, or nothing that
    /// could go elsewhere.
    async fn drain(&mut self, id: u64, limit: Duration, again: &Stop) {
        tracing::info!(
            donor = id,
            "moving what only this donor has; a second signal ends it at once"
        );
        let deadline = Instant::now() + limit;
        let mut left = None;
        while Instant::now() < deadline {
            match self.tell(true).await {
                Ok(lease) if lease.left_bytes == 0 => return,
                Ok(lease) if lease.left_bytes == lease.stuck_bytes => {
                    tracing::warn!(left = %Size(lease.left_bytes), "no other donor has room for it, or nobody copies: dropped");
                    return;
                }
                Ok(lease) => left = Some(lease.left_bytes),
                Err(error) if passing(&error) => {}
                Err(error) => {
                    tracing::warn!(%error, "metad does not let this donor leave in order");
                    return;
                }
            }
            if again.within(RETRY).await {
                return;
            }
        }
        tracing::warn!(left = ?left.map(Size), seconds = limit.as_secs(), "not all was moved in time (--drain-s): the rest is dropped");
    }

    async fn leave(&self) {
        if let Some(id) = self.id {
            let leaving = self.client.donor_leave(v1::DonorRef {
                id,
                epoch: self.donor.epoch,
            });
            let _ = tokio::time::timeout(Duration::from_secs(2), leaving).await;
        }
    }
}

/// Errors that say nothing about this donor.
fn passing(error: &ClientError) -> bool {
    matches!(
        error,
        ClientError::Unavailable { .. } | ClientError::Deadline { .. }
    )
}
