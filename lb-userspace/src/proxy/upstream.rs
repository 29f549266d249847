//! The member's end.

use std::{net::SocketAddr, sync::atomic::Ordering::Relaxed, time::Duration};

use tokio::{io::AsyncWriteExt as _, net::TcpStream, time::timeout};

use super::{
    Service,
    client::ClientStream,
    events::Events,
    header,
    source::{self, Use},
};
use crate::{
    model::ProxyHeader,
    pool::{Lease, LivePool},
    telemetry::session::SessionId,
};

/// A connection to a member, and the place at it. Dropped, it is reset: whatever a member has seen
/// of a message then, it cannot take its end for the end of data.
#[derive(Debug)]
pub(super) struct Upstream {
    pub(super) tcp: TcpStream,
    pub(super) lease: Lease,
    orderly: bool,
    _source: Option<Use>,
}

/// For whom a member is connected.
pub(super) struct Origin<'a> {
    pub(super) service: &'a Service,
    pub(super) client: SocketAddr,
    /// What the client connected to.
    pub(super) local: SocketAddr,
    pub(super) id: SessionId,
    pub(super) stream: &'a ClientStream,
}

impl Upstream {
    /// Connects the best member that was not tried yet, and else the next.
    pub(super) async fn connect(
        pool: &LivePool,
        tried: &mut Vec<u16>,
        origin: &Origin<'_>,
        events: &Events,
    ) -> Option<Self> {
        let limit = origin.service.sessions.timeouts.connect;
        while let Some(lease) = pool.select(tried) {
            tried.push(lease.member().id);
            match open(lease.member().address, origin, limit).await {
                Some((tcp, source)) => {
                    return Some(Self {
                        tcp,
                        lease,
                        orderly: false,
                        _source: source,
                    });
                }
                None => events.member_connect_failed.fetch_add(1, Relaxed),
            };
        }
        None
    }

    /// Closes in order.
    pub(super) fn close(mut self) {
        self.orderly = true;
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        if !self.orderly {
            // A stream that is gone already needs no reset.
            let _ = self.tcp.set_zero_linger();
        }
    }
}

impl Origin<'_> {
    /// What the member is told first.
    fn header(&self) -> Option<Vec<u8>> {
        match self.service.terms.proxy_protocol {
            ProxyHeader::None => None,
            ProxyHeader::V1 => Some(header::v1(self.client, self.local)),
            ProxyHeader::V2 => {
                let id = self.id.to_string();
                let written = |secured: Option<&header::Secured<'_>>| {
                    header::v2(&header::Client {
                        source: self.client,
                        destination: self.local,
                        unique_id: &id,
                        secured,
                    })
                };
                Some(self.stream.with_secured(written))
            }
        }
    }
}

async fn open(
    address: SocketAddr,
    origin: &Origin<'_>,
    limit: Duration,
) -> Option<(TcpStream, Option<Use>)> {
    let opened = async {
        let (mut tcp, used) =
            source::connect(address, &origin.service.source, origin.client.ip()).await?;
        tcp.set_nodelay(true)?;
        if let Some(header) = origin.header() {
            tcp.write_all(&header).await?;
        }
        Ok::<_, std::io::Error>((tcp, used))
    };
    timeout(limit, opened).await.ok()?.ok()
}
