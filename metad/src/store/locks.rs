//! Claims on keys, as the machine of locks has them written down.

use super::{Read, Tx, from_sql, to_sql};
use crate::{
    error::Error,
    locks::{Key, Mode, Row},
};

impl Read<'_> {
    /// All claims.
    pub(crate) fn claims(&self) -> Result<Vec<Row<Key>>, Error> {
        let mut ask = self
            .connection
            .prepare_cached("SELECT key, pull, exclusive, ticket, fence FROM claims")?;
        let mut rows = ask.query([])?;
        let mut claims = Vec::new();
        while let Some(row) = rows.next()? {
            let text: String = row.get(0)?;
            let key = text.parse().map_err(|error| {
                Error::Refused(format!("the database is inconsistent: {error}"))
            })?;
            let exclusive: bool = row.get(2)?;
            let fence: Option<i64> = row.get(4)?;
            claims.push(Row {
                key,
                owner: from_sql(row.get(1)?),
                mode: if exclusive {
                    Mode::Exclusive
                } else {
                    Mode::Shared
                },
                ticket: from_sql(row.get(3)?),
                fence: fence.map(from_sql),
            });
        }
        Ok(claims)
    }
}

impl Tx<'_> {
    /// Writes a claim down, or that it was granted.
    pub(crate) fn put_claim(&self, row: &Row<Key>) -> Result<(), Error> {
        let mut put = self.connection.prepare_cached(
            "INSERT INTO claims (ticket, key, pull, exclusive, fence) VALUES (?1, ?2, ?3, ?4, ?5)
             ON CONFLICT (ticket) DO UPDATE SET fence = excluded.fence",
        )?;
        put.execute((
            to_sql(row.ticket),
            row.key.to_string(),
            to_sql(row.owner),
            row.mode == Mode::Exclusive,
            row.fence.map(to_sql),
        ))?;
        Ok(())
    }

    /// Takes a claim away; one that went with its pull is not there any more.
    pub(crate) fn delete_claim(&self, ticket: u64) -> Result<(), Error> {
        let mut delete = self
            .connection
            .prepare_cached("DELETE FROM claims WHERE ticket = ?1")?;
        delete.execute([to_sql(ticket)])?;
        Ok(())
    }
}
