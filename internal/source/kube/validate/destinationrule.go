package validate

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	networking "istio.io/api/networking/v1alpha3"
)

// DestinationRule checks one.
func DestinationRule(dr *networking.DestinationRule) []string {
	f := &findings{}
	f.check("spec.host", wildcardHost(dr.GetHost()))
	f.trafficPolicy("spec.trafficPolicy", dr.GetTrafficPolicy())
	seen := map[string]bool{}
	for i, s := range dr.GetSubsets() {
		at := fmt.Sprintf("spec.subsets[%d]", i)
		switch {
		case !portName.MatchString(s.GetName()):
			f.add(at+".name", "%q is not a subset's name", s.GetName())
		case seen[s.GetName()]:
			f.add(at+".name", "subset %q is defined twice", s.GetName())
		}
		seen[s.GetName()] = true
		f.labels(at+".labels", s.GetLabels())
		f.trafficPolicy(at+".trafficPolicy", s.GetTrafficPolicy())
	}
	f.selector("spec.workloadSelector", dr.GetWorkloadSelector())
	f.exportTo("spec.exportTo", dr.GetExportTo())
	return f.list
}

func (f *findings) trafficPolicy(at string, p *networking.TrafficPolicy) {
	if p == nil {
		return
	}
	f.loadBalancer(at+".loadBalancer", p.GetLoadBalancer())
	f.connectionPool(at+".connectionPool", p.GetConnectionPool())
	f.outlier(at+".outlierDetection", p.GetOutlierDetection())
	f.clientTLS(at+".tls", p.GetTls())
	if t := p.GetTunnel(); t != nil {
		if proto := t.GetProtocol(); proto != "" && proto != "CONNECT" && proto != "POST" {
			f.add(at+".tunnel.protocol", "%q is neither CONNECT nor POST", proto)
		}
		f.check(at+".tunnel.targetHost", hostname(t.GetTargetHost()))
		f.check(at+".tunnel.targetPort", port(t.GetTargetPort()))
	}
	if b := p.GetRetryBudget(); b.GetPercent() != nil {
		f.check(at+".retryBudget.percent", percent(b.GetPercent().GetValue()))
	}
	for i, s := range p.GetPortLevelSettings() {
		at := fmt.Sprintf("%s.portLevelSettings[%d]", at, i)
		f.check(at+".port.number", port(s.GetPort().GetNumber()))
		f.loadBalancer(at+".loadBalancer", s.GetLoadBalancer())
		f.connectionPool(at+".connectionPool", s.GetConnectionPool())
		f.outlier(at+".outlierDetection", s.GetOutlierDetection())
		f.clientTLS(at+".tls", s.GetTls())
	}
}

// Envoy's limits on hash tables.
const (
	maxRing   = 8 << 20
	maxMaglev = 5000011
)

func (f *findings) loadBalancer(at string, lb *networking.LoadBalancerSettings) {
	if lb == nil {
		return
	}
	if _, ok := networking.LoadBalancerSettings_SimpleLB_name[int32(lb.GetSimple())]; !ok {
		f.add(at+".simple", "%d is no known policy", lb.GetSimple())
	}
	if h := lb.GetConsistentHash(); h != nil {
		at := at + ".consistentHash"
		switch k := h.GetHashKey().(type) {
		case *networking.LoadBalancerSettings_ConsistentHashLB_HttpHeaderName:
			f.check(at+".httpHeaderName", headerName(k.HttpHeaderName))
		case *networking.LoadBalancerSettings_ConsistentHashLB_HttpCookie:
			if !token.MatchString(k.HttpCookie.GetName()) {
				f.add(at+".httpCookie.name", "%q is not a cookie's name", k.HttpCookie.GetName())
			}
			f.check(at+".httpCookie.ttl", durationOrZero(k.HttpCookie.GetTtl()))
		case *networking.LoadBalancerSettings_ConsistentHashLB_HttpQueryParameterName:
			if k.HttpQueryParameterName == "" {
				f.add(at+".httpQueryParameterName", "must not be empty")
			}
		case nil:
			f.add(at, "one of httpHeaderName, httpCookie, useSourceIp and httpQueryParameterName is required")
		}
		if h.GetRingHash().GetMinimumRingSize() > maxRing {
			f.add(at+".ringHash.minimumRingSize", "must be at most %d", maxRing)
		}
		if n := h.GetMaglev().GetTableSize(); n != 0 && (n > maxMaglev || !prime(n)) {
			f.add(at+".maglev.tableSize", "%d must be a prime number of at most %d", n, maxMaglev)
		}
	}
	if w := lb.GetWarmup(); w != nil {
		f.check(at+".warmup.duration", duration(w.GetDuration()))
		if w.GetDuration() == nil {
			f.add(at+".warmup.duration", "is required")
		}
		if w.GetMinimumPercent() != nil {
			f.check(at+".warmup.minimumPercent", percent(w.GetMinimumPercent().GetValue()))
		}
		if w.GetAggression() != nil && w.GetAggression().GetValue() < 1 {
			f.add(at+".warmup.aggression", "must be at least 1")
		}
	}
	f.localityLB(at+".localityLbSetting", lb.GetLocalityLbSetting())
}

func prime(n uint64) bool {
	if n < 2 {
		return false
	}
	for d := uint64(2); d*d <= n; d++ {
		if n%d == 0 {
			return false
		}
	}
	return true
}

func (f *findings) localityLB(at string, l *networking.LocalityLoadBalancerSetting) {
	if len(l.GetDistribute()) > 0 && (len(l.GetFailover()) > 0 || len(l.GetFailoverPriority()) > 0) {
		f.add(at, "distribute excludes failover and failoverPriority")
	}
	for i, d := range l.GetDistribute() {
		at := fmt.Sprintf("%s.distribute[%d]", at, i)
		if d.GetFrom() == "" {
			f.add(at+".from", "is required")
		}
		var sum uint64
		for _, to := range slices.Sorted(maps.Keys(d.GetTo())) {
			if d.GetTo()[to] == 0 {
				f.add(at+".to", "the weight of %s must not be 0", to)
			}
			sum += uint64(d.GetTo()[to])
		}
		if sum != 100 {
			f.add(at+".to", "the weights add up to %d, not to 100", sum)
		}
	}
	for i, o := range l.GetFailover() {
		at := fmt.Sprintf("%s.failover[%d]", at, i)
		if o.GetFrom() == "" || o.GetTo() == "" {
			f.add(at, "from and to are required")
		} else if o.GetFrom() == o.GetTo() {
			f.add(at, "from and to are both %q", o.GetFrom())
		}
		if strings.ContainsAny(o.GetFrom()+o.GetTo(), "/*") {
			f.add(at, "from and to are regions, without zones and wildcards")
		}
	}
}

func (f *findings) connectionPool(at string, c *networking.ConnectionPoolSettings) {
	if c == nil {
		return
	}
	if t := c.GetTcp(); t != nil {
		at := at + ".tcp"
		f.check(at+".maxConnections", notNegative(t.GetMaxConnections()))
		f.check(at+".connectTimeout", duration(t.GetConnectTimeout()))
		f.check(at+".idleTimeout", durationOrZero(t.GetIdleTimeout()))
		f.check(at+".maxConnectionDuration", duration(t.GetMaxConnectionDuration()))
		f.check(at+".tcpKeepalive.time", wholeSeconds(t.GetTcpKeepalive().GetTime()))
		f.check(at+".tcpKeepalive.interval", wholeSeconds(t.GetTcpKeepalive().GetInterval()))
	}
	if h := c.GetHttp(); h != nil {
		at := at + ".http"
		f.check(at+".http1MaxPendingRequests", notNegative(h.GetHttp1MaxPendingRequests()))
		f.check(at+".http2MaxRequests", notNegative(h.GetHttp2MaxRequests()))
		f.check(at+".maxRequestsPerConnection", notNegative(h.GetMaxRequestsPerConnection()))
		f.check(at+".maxRetries", notNegative(h.GetMaxRetries()))
		f.check(at+".maxConcurrentStreams", notNegative(h.GetMaxConcurrentStreams()))
		f.check(at+".idleTimeout", durationOrZero(h.GetIdleTimeout()))
		if h.GetUseClientProtocol() && h.GetH2UpgradePolicy() == networking.ConnectionPoolSettings_HTTPSettings_UPGRADE {
			f.add(at, "useClientProtocol and h2UpgradePolicy UPGRADE exclude each other")
		}
	}
}

// wholeSeconds are what the kernel counts keep-alives in.
func wholeSeconds(d *durationpb.Duration) error {
	if v := d.AsDuration(); d != nil && (v < time.Second || v%time.Second != 0) {
		return fmt.Errorf("%s is not a positive number of whole seconds", v)
	}
	return nil
}

func (f *findings) outlier(at string, o *networking.OutlierDetection) {
	if o == nil {
		return
	}
	f.check(at+".interval", duration(o.GetInterval()))
	f.check(at+".baseEjectionTime", duration(o.GetBaseEjectionTime()))
	f.check(at+".maxEjectionPercent", percent(float64(o.GetMaxEjectionPercent())))
	f.check(at+".minHealthPercent", percent(float64(o.GetMinHealthPercent())))
	if o.GetConsecutiveLocalOriginFailures() != nil && !o.GetSplitExternalLocalOriginErrors() {
		f.add(at+".consecutiveLocalOriginFailures", "needs splitExternalLocalOriginErrors")
	}
}

func (f *findings) clientTLS(at string, t *networking.ClientTLSSettings) {
	if t == nil {
		return
	}
	if _, ok := networking.ClientTLSSettings_TLSmode_name[int32(t.GetMode())]; !ok {
		f.add(at+".mode", "%d is no known mode", t.GetMode())
	}
	files := t.GetClientCertificate() != "" || t.GetPrivateKey() != "" || t.GetCaCertificates() != ""
	if t.GetCredentialName() != "" && files {
		f.add(at, "credentialName excludes clientCertificate, privateKey and caCertificates")
	}
	switch t.GetMode() {
	case networking.ClientTLSSettings_MUTUAL:
		if t.GetCredentialName() == "" && (t.GetClientCertificate() == "" || t.GetPrivateKey() == "") {
			f.add(at, "mode MUTUAL needs clientCertificate and privateKey, or credentialName")
		}
	case networking.ClientTLSSettings_ISTIO_MUTUAL:
		if files || t.GetCredentialName() != "" {
			f.add(at, "mode ISTIO_MUTUAL uses the mesh's certificates: no others can be given")
		}
	}
	if t.GetSni() != "" {
		f.check(at+".sni", hostname(t.GetSni()))
	}
	if t.GetInsecureSkipVerify().GetValue() && (t.GetCaCertificates() != "" || len(t.GetSubjectAltNames()) > 0) {
		f.add(at+".insecureSkipVerify", "excludes caCertificates and subjectAltNames")
	}
}
