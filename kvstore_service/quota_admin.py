"""Showing and setting what tenants may use: ``Admin.Quota`` of a store and of a gateway."""

from kvstrata.kvstore_service.quota import Quotas
from kvstrata.kvstore_service.tenants import LIMITS, Tenant, Tenants
from kvstrata.protos import admin_pb2 as pb
from kvstrata.protos.errors import InvalidRequestError


def answer_quota(request: pb.QuotaRequest, tenants: Tenants, quotas: Quotas) -> pb.QuotaReply:
    """Return what ``Quota`` answers, after setting the limits that are given.

    Raises:
        NotFoundError: No such tenant.
        InvalidRequestError: Limits without a tenant, or out of range.
    """
    given = {limit: getattr(request, limit) for limit in LIMITS if request.HasField(limit)}
    if given and not request.tenant:
        raise InvalidRequestError("limits for nobody", "name the tenant")
    if given:
        tenants.limit(request.tenant, given)
    shown = [tenants.named(request.tenant)] if request.tenant else tenants.all()
    return pb.QuotaReply(tenants=[_told(tenant, quotas) for tenant in shown])


def _told(tenant: Tenant, quotas: Quotas) -> pb.TenantQuota:
    usage = quotas.of(tenant)
    return pb.TenantQuota(
        tenant=tenant.name,
        quota_bytes=tenant.quota_bytes,
        requests_per_s=tenant.requests_per_s,
        in_flight_bytes=tenant.in_flight_bytes,
        stored_bytes_now=usage.stored_bytes,
        in_flight_bytes_now=usage.in_flight_bytes,
    )
