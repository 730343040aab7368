{{/* vLLM's router. It has no keys and no TLS, and paths that add and remove servers, so only this pod can reach it. */}}
{{- define "serving.routerContainer" -}}
image: {{ include "serving.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
command: [vllm-router]
args:
  - --host
  - 127.0.0.1
  - --port
  - "30000"
  - --prometheus-host
  - {{ .Values.listenAddress | quote }}
  - --prometheus-port
  - "29000"
  {{- with .Values.router }}
  - --policy
  - {{ .policy }}
  - --cache-threshold
  - {{ .cacheThreshold | quote }}
  - --balance-abs-threshold
  - {{ .balanceThreshold | int | quote }}
  - --request-timeout-secs
  - {{ .requestTimeoutSeconds | int | quote }}
  - --retry-max-retries
  - {{ .maxRetries | int | quote }}
  - --cb-failure-threshold
  - {{ .circuitBreaker.failures | int | quote }}
  - --cb-success-threshold
  - "1"
  - --cb-timeout-duration-secs
  - {{ .circuitBreaker.seconds | int | quote }}
  - --health-check-interval-secs
  - {{ .healthCheckSeconds | int | quote }}
  {{- range .extraArgs }}
  - {{ . | quote }}
  {{- end }}
  {{- end }}
env:
  {{- include "serving.baseEnv" . | nindent 2 }}
ports:
  - name: metrics
    containerPort: 29000
    protocol: TCP
securityContext:
  {{- include "serving.containerSecurityContext" . | nindent 2 }}
resources:
  {{- toYaml .Values.router.resources | nindent 2 }}
livenessProbe:
  httpGet: {path: /metrics, port: metrics}
  initialDelaySeconds: 30
  periodSeconds: 15
  timeoutSeconds: 10
  failureThreshold: 4
# Stops after the front, which accepts requests until Services have removed the pod.
lifecycle:
  preStop:
    exec:
      command:
        - python
        - -c
        - |
          {{- .Files.Get "files/drain.py" | trim | nindent 10 }}
        - {{ add 5 (int .Values.drain.delaySeconds) | quote }}
        - {{ .Values.drain.timeoutSeconds | int | quote }}
        - http://127.0.0.1:29000/metrics
        - vllm_router_running_requests
terminationMessagePolicy: FallbackToLogsOnError
volumeMounts:
  - name: tmp
    mountPath: /tmp
{{- end }}

{{/* TLS and keys in front of the router, and verified TLS between router and servers. */}}
{{- define "serving.frontContainer" -}}
image: {{ include "serving.image" . | quote }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
command: [python, -m, uvicorn, --factory, "ictx.serve.front:app"]
args:
  # uvicorn listens on both families only without an address.
  - --host
  - {{ ternary "" .Values.listenAddress (eq .Values.listenAddress "::") | quote }}
  - --port
  - "8000"
  - --no-access-log
  # Longer than proxies keep idle connections.
  - --timeout-keep-alive
  - "120"
  - --timeout-graceful-shutdown
  - {{ .Values.drain.timeoutSeconds | int | quote }}
  {{- if .Values.tls.enabled }}
  - --ssl-certfile
  - /etc/ictx/tls/tls.crt
  - --ssl-keyfile
  - /etc/ictx/tls/tls.key
  {{- end }}
env:
  {{- include "serving.baseEnv" . | nindent 2 }}
  - name: ICTX_API_KEYS
    value: /etc/ictx/keys
  - name: ICTX_ROUTER
    value: http://127.0.0.1:30000
  - name: ICTX_REPLICAS
    value: {{ printf "%s-replicas" (include "serving.fullname" .) }}
  {{- $backends := include "serving.backends" . | fromJsonArray }}
  {{- if $backends }}
  - name: ICTX_SERVICE
    value: {{ include "serving.fullname" . }}
  - name: ICTX_WEIGHT
    value: {{ ternary (sub 100 (int .Values.canary.weight)) 100 (eq (include "serving.canaryByRouter" .) "true") | quote }}
  - name: ICTX_BACKENDS
    value: {{ toJson $backends | quote }}
  {{- if .Values.tls.enabled }}
  - name: ICTX_BACKENDS_CA
    value: /etc/ictx/backends
  {{- end }}
  {{- end }}
  {{- if .Values.tls.enabled }}
  - name: ICTX_REPLICAS_NAME
    value: {{ include "serving.fullname" . }}
  - name: ICTX_REPLICAS_CA
    value: /etc/ictx/tls/ca.crt
  {{- end }}
ports:
  - name: {{ include "serving.scheme" . }}
    containerPort: 8000
    protocol: TCP
securityContext:
  {{- include "serving.containerSecurityContext" . | nindent 2 }}
resources:
  {{- toYaml .Values.router.resources | nindent 2 }}
# Not ready while no server is ready.
readinessProbe:
  {{- include "serving.probe" . | nindent 2 }}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 2
livenessProbe:
  tcpSocket: {port: {{ include "serving.scheme" . }}}
  periodSeconds: 15
  failureThreshold: 4
lifecycle:
  preStop:
    exec:
      command: [sleep, {{ .Values.drain.delaySeconds | int | quote }}]
terminationMessagePolicy: FallbackToLogsOnError
volumeMounts:
  - name: keys
    mountPath: /etc/ictx/keys
    readOnly: true
  {{- if .Values.tls.enabled }}
  - name: tls
    mountPath: /etc/ictx/tls
    readOnly: true
  {{- if $backends }}
  - name: backends
    mountPath: /etc/ictx/backends
    readOnly: true
  {{- end }}
  {{- end }}
  - name: tmp
    mountPath: /tmp
{{- end }}
