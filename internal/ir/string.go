package ir

// String gives "namespace/name", of a ServiceEntry with the host.
func (k ServiceKey) String() string {
	if k.Entry {
		return k.Namespace + "/" + k.Name + "[" + k.Host + "]"
	}
	return k.Namespace + "/" + k.Name
}
